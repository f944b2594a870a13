"""WHICH region: one folder per paper, none knows another."""

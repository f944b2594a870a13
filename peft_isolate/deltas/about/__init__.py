"""What an adapter is, shown to people: numbers of it, a table, the model card."""

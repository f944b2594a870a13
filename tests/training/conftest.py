"""TRL's trainers on tiny models: a few steps, one thread, no bars."""

import datasets
import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _quiet_and_small():
    threads = torch.get_num_threads()
    # More threads only get in each other's way on matrices of this size.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@pytest.fixture
def options(tmp_path):
    """Options that every run here shares."""
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_length": 48,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }

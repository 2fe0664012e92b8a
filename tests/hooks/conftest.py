"""A fixture of tests that build verl's training worker in this process."""

import pytest


@pytest.fixture(scope="module")
def process_group():
    """A process group of this process alone; what verl changes in transformers ends with the file."""
    # here, because test_trainer.py sets a variable that verl reads when it is imported
    import torch
    from support.engine_rows import single_process_group
    from support.family_models import patches_undone

    single_process_group()
    torch.set_num_threads(1)
    with patches_undone():
        yield

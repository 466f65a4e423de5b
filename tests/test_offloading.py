"""Offloading of what checkpointing keeps, as far as a machine without a GPU can tell; on one: test_gpu_runs.py."""

from contextlib import nullcontext

import pytest
import torch

from ebft.forward import OFFLOADER
from ebft.offloading import offload_activations
from test_trainer_step import ROWS, make_model
from training import small_model, train


def test_models_that_do_not_pack_are_refused():
    with pytest.raises(ValueError, match="activation_offloading=True was not tried with Mamba.*: leave it off"):
        offload_activations(small_model("mamba"))


def test_next_run_on_the_same_model_does_without(tmp_path):
    """Its forward may be one of several that wait for their backward, as those of sampling do."""

    def left_over():
        assert not torch.is_grad_enabled(), "the run before offloads"
        return nullcontext()

    model = make_model()
    vars(model.base_model)[OFFLOADER] = left_over
    train(model, ROWS, tmp_path)

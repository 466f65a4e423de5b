"""Weights that are missing, incomplete or cut off are found from names and headers, before any work."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ebft.evaluation.weights import check_weights
from tiny_models import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model(vocab_size=64).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        check_weights(str(folder))


def test_a_whole_file(folder):
    check_weights(str(folder))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(folder, r"model_name_or_path: .*: model\.safetensors is damaged or cut off")
    weights.unlink()
    # What a Trainer keeps beside the weights is none.
    torch.save({}, folder / "training_args.bin")
    save_file({"a": torch.zeros(1)}, folder / "optimizer.safetensors")
    refused(folder, r"holds no weights \(model\.safetensors\): name the folder")


def test_weights_in_parts(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(parts.values()):
        save_file({name: tensors[name] for name, of in parts.items() if of == part}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    check_weights(str(folder))
    (folder / "part-1.safetensors").unlink()
    refused(folder, r"part-1\.safetensors is missing, which model\.safetensors\.index\.json names")
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere/model.safetensors"}}))
    refused(folder, r"names '\.\./elsewhere/model\.safetensors', which is not in its folder")
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        refused(folder, r"index\.json is no index of weights")


def test_an_adapter(folder):
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    check_weights(str(folder))


def test_a_name_on_the_hub(tmp_path, monkeypatch):
    """Offline: what the cache holds."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--us--ours"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    with pytest.raises(ValueError, match="us/ours: neither the Hub nor its cache here has weights of it"):
        check_weights("us/ours")
    (snapshot / "model.safetensors.index.json").write_text("{}")
    check_weights("us/ours")

"""What is read runs no code: hostile pickles, code that a model brings along, and YAML with Python in it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import Dataset

from ebft import EBFTTrainer, pickles
from ebft.cli import main
from ebft.evaluation.weights import check_weights
from ebft.feature_models import load_feature_network
from ebft.integrations.feature_network import load_network
from ebft.models import load_policy
from ebft.pretrained import load_config, load_tokenizer, read_weights
from ebft.text_features import EncoderReader
from hostile import Hostile
from tiny import byte_bpe_tokenizer
from training import config, documents, reseal, small_model, train

SAVING = dict(max_steps=1, save_strategy="steps", save_steps=1, optim="adamw_torch")


@pytest.fixture
def mark(tmp_path):
    """What is there once hostile code has run."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "hostile code has run"


@pytest.fixture
def model(tmp_path):
    """A tiny model with its tokenizer, in a folder."""
    small_model().save_pretrained(tmp_path / "model")
    byte_bpe_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_pickle_is_hostile(tmp_path):
    torch.save({"a": Hostile(tmp_path / "ran")}, tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_a_model_that_is_a_pickle_is_refused(model, mark, tmp_path):
    shutil.copytree(model, tmp_path / "whole")
    (model / "model.safetensors").unlink()
    torch.save({"a": Hostile(mark)}, model / "pytorch_model.bin")
    name, args = str(model), config(tmp_path / "run")
    refused = "{}.* has its weights in pytorch_model.bin, a pickle, .*: convert"
    with pytest.raises(ValueError, match=refused.format("model_name_or_path=")):
        load_policy(name, args)
    with pytest.raises(ValueError, match=refused.format("model_name_or_path=")):
        check_weights(name)
    policy = load_policy(str(tmp_path / "whole"), args)
    with pytest.raises(ValueError, match=refused.format("feature_model_name_or_path=")):
        load_feature_network(policy, args, name, byte_bpe_tokenizer())
    with pytest.raises(ValueError, match=refused.format("feature_model=")):
        load_network(name, byte_bpe_tokenizer())
    for option in ({"use_safetensors": False}, {"weights_only": False}):
        with pytest.raises(ValueError, match=f"model_init_kwargs: {next(iter(option))}=False would read weights"):
            load_policy(name, config(tmp_path / "run", model_init_kwargs=option))


def test_weights_elsewhere_are_refused(model, run, tmp_path):
    """Also where they are in a checkpoint that is resumed."""
    shutil.copytree(run, tmp_path / "run")
    refused = r"names '\.\./elsewhere.safetensors', which is not in its folder"
    for folder in (model, tmp_path / "run" / "checkpoint-1"):
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        names = {"weight_map": dict.fromkeys(("a", "b"), "../elsewhere.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    reseal(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=f"model_name_or_path: .*{refused}"):
        load_policy(str(model), config(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: .*{refused}"):
        resume(tmp_path / "run")


def test_an_adapter_that_is_a_pickle_is_refused(tmp_path, mark):
    (tmp_path / "adapter_config.json").write_text("{}")
    torch.save({"a": Hostile(mark)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"in adapter_model\.bin, a pickle"):
        check_weights(str(tmp_path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of one step."""
    folder = tmp_path_factory.mktemp("run")
    train(small_model(), documents([30] * 4), folder, settings=SAVING)
    return folder


def resume(folder: Path) -> None:
    train(small_model(), documents([30] * 4), folder, True, settings=SAVING | {"max_steps": 2})


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_hostile_pickle_is_not_resumed(run, tmp_path, mark, name):
    shutil.copytree(run, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-1" / name).exists()
    torch.save({"a": Hostile(mark)}, tmp_path / "run" / "checkpoint-1" / name)
    reseal(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*holds more than data .* resume from another"):
        resume(tmp_path / "run")


def test_a_checkpoint_whose_weights_are_a_pickle_is_not_resumed(run, tmp_path, mark):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / "model.safetensors").unlink()
    torch.save({"a": Hostile(mark)}, tmp_path / "run" / "checkpoint-1" / "pytorch_model.bin")
    reseal(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.* pytorch_model\.bin, a pickle"):
        resume(tmp_path / "run")


def test_metadata_of_a_sharded_checkpoint(tmp_path, mark):
    """Torch reads them without restriction: what it writes itself passes, anything else does not."""
    folder = tmp_path / "pytorch_model_fsdp_0"
    state = {"w": torch.ones(2, dtype=torch.bfloat16), "i": torch.ones(2, dtype=torch.int64), "lr": 0.1}
    dcp.save({"model": state}, checkpoint_id=folder)
    with pickles.resuming(tmp_path):
        pass
    for text in (b"c__builtin__\neval\n(V1+1\ntR.", b"\x80\x04.", b""):
        (folder / ".metadata").write_bytes(text)
        with (
            pytest.raises(ValueError, match="metadata holds more than data or is damaged"),
            pickles.resuming(tmp_path),
        ):
            pass
    (folder / ".metadata").write_bytes(f"cposix\nmkdir\n(V{mark}\ntR.".encode())
    with pytest.raises(ValueError, match=r"it names posix\.mkdir"), pickles.resuming(tmp_path):
        pass


def test_values_beside_the_tensors_of_a_sharded_checkpoint(tmp_path, mark):
    """Torch reads them without restriction, too: an optimiser's settings pass."""
    settings = {"lr": 0.1, "betas": (0.9, 0.95), "foreach": None, "name": "adamw", "step": torch.tensor(3.0)}
    folder = tmp_path / "optimizer_0"
    dcp.save({"optimizer": {"w": torch.ones(2)} | settings}, checkpoint_id=folder)
    with pickles.resuming(tmp_path):
        pass
    dcp.save({"optimizer": {"w": torch.ones(2), "lr": Hostile(mark)}}, checkpoint_id=folder)
    with pytest.raises(ValueError, match=r"\.lr is more than data\)"), pickles.resuming(tmp_path):
        dcp.load({"optimizer": {"w": torch.ones(2), "lr": 0.1}}, checkpoint_id=folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../optimizer_0/{place.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="not in that folder"), pickles.resuming(tmp_path):
        pass


# Code that a model brings along --------------------------------------------------------------------------------------


@pytest.fixture
def strange(model):
    """A model whose config and tokenizer are classes of its own, in files that leave a mark."""
    values = json.loads((model / "config.json").read_text())
    values |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (model / "config.json").write_text(json.dumps(values))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    mark = model.parent / "mark"
    (model / "code.py").write_text(
        f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class Config(Qwen2Config):\n    model_type = 'strange'\n"
        "class Model(Qwen2ForCausalLM):\n    config_class = Config\n"
    )
    return str(model)


def test_a_models_own_code_is_not_run(strange, mark, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    args = config(tmp_path / "run")
    needs = "needs code of its own, which is not run"
    dataset = Dataset.from_list([{"text": "the quick brown fox"}])
    with pytest.raises(ValueError, match=f"model_name_or_path=.*{needs}"):
        EBFTTrainer(strange, args, train_dataset=dataset)
    with pytest.raises(ValueError, match=needs):
        load_tokenizer(strange)
    with pytest.raises(ValueError, match="trust_remote_code"):
        read_weights(strange, load_policy(small_model(), args).config, torch.float32, {})
    tokenizer = byte_bpe_tokenizer()
    with pytest.raises(ValueError, match=f"feature_model_name_or_path=.*{needs}"):
        EBFTTrainer(small_model(), args, None, dataset, processing_class=tokenizer, feature_model=strange)
    evaluate = ["evaluate", "--model_name_or_path", strange, "--dataset_name", "held_out.jsonl"]
    assert main([*evaluate, "--output_dir", str(tmp_path / "out")]) == 2
    pytest.importorskip("sentence_transformers")
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        EncoderReader(strange, None, "joint")


def test_a_models_own_code_is_run_if_asked(strange, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert load_config(strange, trust_remote_code=True).model_type == "strange"
    assert (tmp_path / "mark").is_dir()


# YAML ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "plan", "evaluate", "compare"])
def test_yaml_makes_no_objects(verb, tmp_path, mark, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(f"model_name_or_path: !!python/object/apply:os.mkdir ['{mark}']\n")
    assert main([verb, "--config", str(path)]) == 2
    assert "could not determine a constructor" in capsys.readouterr().err


def test_settings_of_a_run_make_no_objects(tmp_path, mark):
    pytest.importorskip("plotly")
    (tmp_path / "resolved_config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{mark}']\n")
    assert main(["report", str(tmp_path)]) == 0

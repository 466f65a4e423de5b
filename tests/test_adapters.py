"""Adapters of every kind, on full and on few-bit weights: steps, features, reloading, resuming, merging."""

import copy
import importlib.util
import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ebft import FeatureNetwork, pretrained
from ebft.cli import main
from ebft.models import load_policy
from ragged import ragged_batch, random_tokens
from test_trainer_step import ROWS, check_step, oracle_documents
from tiny import byte_bpe_tokenizer
from training import config, files, small_model, train

INPUT_IDS, LAYOUT = ragged_batch()
TOKENS = random_tokens(LAYOUT, len(INPUT_IDS), 2)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'ebft[quantization]'"
)


def lora(*targets, **options):
    """B is not zero at the start: the policy is not its own base, and every adapter weight moves."""
    return LoraConfig(**dict(r=4, target_modules=list(targets), init_lora_weights=False) | options)


ADAPTERS = {
    "dora": lora("q_proj", "up_proj", use_dora=True),
    "rslora": lora("q_proj", "up_proj", use_rslora=True),
    "all-linear": lora(target_modules="all-linear"),
    "some layers": lora("q_proj", layers_to_transform=[1]),
    "head": lora("q_proj", "lm_head"),
    "head, dora": lora("lm_head", use_dora=True),
    "head, bias": lora("lm_head", lora_bias=True),
    "embeddings": lora("q_proj", "embed_tokens"),
    "head and embeddings": lora("lm_head", "embed_tokens"),
    "whole head": lora("q_proj", modules_to_save=["lm_head"]),
    "whole embeddings": lora("q_proj", modules_to_save=["embed_tokens"]),
    "whole norm": lora("q_proj", modules_to_save=["norm"]),
    "some tokens": lora("q_proj", trainable_token_indices=[5, 6, 7]),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": LoHaConfig(target_modules=["q_proj"], r=2, init_weights=False),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0, init_weights=False),
}
AT_THE_ENDS = [name for name in ADAPTERS if name.startswith(("head", "emb", "whole e", "whole h", "some t"))]


def adapted(base, adapter):
    torch.manual_seed(5)
    adapter = ADAPTERS[adapter] if isinstance(adapter, str) else adapter
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(adapter))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # else it would equal the base's
            parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("adapter", "tied"), [*((name, False) for name in ADAPTERS), *((name, True) for name in AT_THE_ENDS)]
)
def test_step_is_the_oracles(tmp_path, adapter, tied):
    """Features and KL are those of the base, the update that of the adapter: at both ends of the model too."""
    base = small_model(dtype=torch.float64, scale=8.0, tie_word_embeddings=tied)
    model = adapted(base, adapter)
    plain = copy.deepcopy(model)
    run = train(model, ROWS, tmp_path, settings=dict(beta=0.1))
    assert run.trainer.feature_network.model is run.trainer.model
    check_step(run, plain, oracle_documents(ROWS), base=base)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_features_with_adapters_off_are_the_bases(tmp_path, adapter):
    """To the last bit."""
    base = small_model(scale=8.0)
    policy = load_policy(adapted(base, adapter), config(tmp_path))
    found, expected = (
        FeatureNetwork(policy)(INPUT_IDS, TOKENS, LAYOUT),
        FeatureNetwork(base)(INPUT_IDS, TOKENS, LAYOUT),
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    ids = INPUT_IDS[:1, :9]
    assert not torch.equal(policy(input_ids=ids).logits, base(input_ids=ids).logits)


def saved_base(folder, **options):
    small_model(dtype=torch.float32, scale=8.0, **options).save_pretrained(folder)
    byte_bpe_tokenizer().save_pretrained(folder)
    return str(folder)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS[:1, :9]).logits


@pytest.mark.parametrize("adapter", ["dora", "head", "head and embeddings", "whole head", "some tokens", "oft"])
def test_reload_and_merge(tmp_path, adapter, capsys):
    """What is saved is the adapter, loads exactly, and merges; the merged model is the sum."""
    base = saved_base(tmp_path / "base")
    settings = dict(max_steps=2, save_strategy="steps", save_steps=2)
    run = train(base, ROWS, tmp_path / "run", settings=settings, peft_config=ADAPTERS[adapter])
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    whole = {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    names = {name.removeprefix("base_model.model.") for name in load_file(checkpoint / "adapter_model.safetensors")}
    if "embeddings" not in adapter and "whole" not in adapter:
        assert not names & whole
    reloaded, trained = AutoPeftModelForCausalLM.from_pretrained(checkpoint), logits_of(run.trainer.model)
    assert torch.equal(logits_of(reloaded), trained)

    assert main(["merge", str(checkpoint), "--output_dir", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, logits_of(AutoModelForCausalLM.from_pretrained(base)), rtol=1e-2, atol=1e-2)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_an_adapter_says_of_which_revision_its_base_is(tmp_path, monkeypatch):
    """The tokenizer is that of the revision, too."""
    base, args = saved_base(tmp_path / "base"), config(tmp_path, model_init_kwargs={"revision": "abc"})
    load_policy(base, args, copy.deepcopy(ADAPTERS["rslora"])).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "abc"
    asked = []
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda *words: asked.append(words))
    pretrained.load_policy_tokenizer(base, args)
    assert asked == [(base, "abc", False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{base}", "--output_dir", "{out}"], "holds a whole model already"),
        (["{out}", "--output_dir", "{out}"], "is no folder with an adapter"),
        (["{adapter}", "--output_dir", "{base}"], "base is not empty; name a new folder"),
        (["{adapter}"], "required: --output_dir"),
        (["{adapter}", "--output_dir", "{out}", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["{adapter}", "--output_dir", "{out}"], "cannot be merged"),
        (["{pickle}", "--output_dir", "{out}"], "no adapter_model.safetensors"),
    ],
)
def test_merge_refuses(tmp_path, capsys, words, message):
    base = saved_base(tmp_path / "base")
    unmergeable = adapted(AutoModelForCausalLM.from_pretrained(base), lora("q_proj", use_dora=True))
    unmergeable.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: value * torch.nan for name, value in load_file(weights).items()}, weights)
    shutil.copytree(tmp_path / "adapter", tmp_path / "pickle")
    (tmp_path / "pickle" / weights.name).rename(tmp_path / "pickle" / "adapter_model.bin")
    names = {name: str(tmp_path / name) for name in ("base", "adapter", "pickle", "out")}
    assert main(["merge", *(word.format(**names) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- weights of few bits ---

FOUR = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
BITS = {"4": FOUR, "4, nested": FOUR | dict(bnb_4bit_use_double_quant=True), "8": dict(load_in_8bit=True)}


def quantised(folder, bits, device="cpu"):
    options = dict(quantization_config=BitsAndBytesConfig(**BITS[bits]), dtype=torch.float32, device_map=device)
    return AutoModelForCausalLM.from_pretrained(saved_base(folder), **options)


def dequantised(model):
    """The same model with ordinary weights of the same values."""
    import bitsandbytes

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        plain.bias = None if module.bias is None else torch.nn.Parameter(module.bias.data.float(), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


@needs_bitsandbytes
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("bits", "tolerance"), [("4", 1e-5), ("4, nested", 1e-5), ("8", 0.1)])
def test_step_on_few_bits_is_that_on_their_values(tmp_path, bits, tolerance, reuse):
    """With 8 bits activations are rounded as well, which the oracle's are not."""
    model = quantised(tmp_path / "base", bits)
    plain = adapted(dequantised(model), lora("q_proj", "up_proj"))
    model = adapted(model, lora("q_proj", "up_proj"))
    run = train(model, ROWS, tmp_path / "run", settings=dict(reuse_sampling_forward=reuse))
    for i, weights in enumerate(run.weights):
        run.weights[i] = plain.state_dict() | {name: value for name, value in weights.items() if "lora" in name}
    check_step(run, plain, oracle_documents(ROWS), tolerance=tolerance, metric_tolerance=tolerance)


def check_features_of_few_bits(folder, bits, device="cpu", **settings):
    """To the last bit, and no matter how often sampling and training took turns."""
    args, inputs = config(folder, **settings), (INPUT_IDS.to(device), TOKENS.to(device), LAYOUT)
    base = load_policy(adapted(quantised(folder / "base", bits, device), lora("k_proj", r=1)), args).unload()
    expected = FeatureNetwork(base)(*inputs)
    policy = adapted(quantised(folder / "again", bits, device), lora("q_proj", "up_proj"))
    run = train(policy, ROWS, folder / "run", settings=dict(max_steps=2) | settings)
    found = run.trainer.feature_network(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4", "8"])
def test_features_of_few_bits_are_the_bases(tmp_path, bits):
    check_features_of_few_bits(tmp_path, bits)


def check_resume_on_few_bits(folder, bits, **more):
    """Only the adapter is saved, and a resumed run ends in the same bits."""
    base = saved_base(folder / "base")
    settings = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2)
    options = dict(settings=settings | more, peft_config=lora("q_proj", "up_proj"))
    options["quantization_config"] = BitsAndBytesConfig(**BITS[bits])
    whole = train(base, ROWS, folder / "whole", **options)
    checkpoint = folder / "whole" / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    rest = train(base, ROWS, folder / "rest", resume=str(checkpoint), **options)
    adapter = "checkpoint-4/adapter_model.safetensors"
    assert (folder / "rest" / adapter).read_bytes() == (folder / "whole" / adapter).read_bytes()
    rollouts = "rollouts/step_000004.parquet"
    assert files(rest.folder, rollouts) == files(whole.folder, rollouts) != {}
    assert rest.metrics[-1]["loss"] == whole.metrics[-1]["loss"]


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4", "8"])
def test_resume_on_few_bits(tmp_path, bits):
    check_resume_on_few_bits(tmp_path, bits)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", ["4", "8"])
def test_few_bits_by_command(tmp_path, capsys, bits):
    """Trained, evaluated and merged; without an adapter refused before anything is read."""
    base, out, merged = saved_base(tmp_path / "base"), str(tmp_path / "run"), str(tmp_path / "merged")
    data = tmp_path / "data.jsonl"
    data.write_text(4 * (json.dumps({"text": "the fox sleeps under a tree " * 3}) + "\n"))
    words = ["--model_name_or_path", base, "--dataset_name", str(data), f"--load_in_{bits}bit", "true"]
    words += ["--max_length", "40", "--max_steps", "1", "--use_cpu", "true", "--report_to", "none"]
    assert main(["train", *words, "--output_dir", out]) == 2
    assert f"load_in_{bits}bit" in (error := capsys.readouterr().err) and "add use_peft: true" in error
    assert main(["plan", *words, "--output_dir", out]) == 2
    assert main(["train", *words, "--use_peft", "--output_dir", out]) == 0
    assert main(["merge", out, "--output_dir", merged, "--dtype", "bfloat16"]) == 0
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.dtype == torch.bfloat16 and not getattr(model, "is_quantized", False)

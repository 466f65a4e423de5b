"""`ebft merge`: an adapter and its base model become one model, for engines that want it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebft.cli.words import WordParser

HELP = """\
usage: ebft merge ADAPTER --output_dir DIR [--dtype bfloat16]

Adds the adapter of a run, or of one of its checkpoints, to the weights of its base model and writes the whole model,
with its tokenizer, to DIR. The base is read anew in float32, also where training had it in 4 or 8 bits: weights are
rounded once, after the sum.

  --output_dir DIR     where the model goes; must not hold one yet
  --dtype float32      of the weights: float32, bfloat16 or float16

examples:
  ebft merge runs/my-run --output_dir merged
  ebft merge runs/my-run/checkpoint-500 --output_dir merged --dtype bfloat16
"""

DTYPES = ("float32", "bfloat16", "float16")


def run(argv: list[str]) -> None:
    """Merge; see HELP.

    Args:
        argv: The words after `ebft merge`.

    Raises:
        ValueError: There is no adapter, it cannot be merged, or `output_dir` holds something.
    """
    parser = WordParser("merge")
    parser.add_argument("adapter")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(argv)
    folder, output = Path(options.adapter), Path(options.output_dir)
    if not (folder / "adapter_config.json").is_file():
        what = "holds a whole model already" if (folder / "config.json").is_file() else "is no folder with an adapter"
        raise ValueError(f"{folder} {what}: name a folder that has adapter_config.json, as a run with use_peft leaves")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output_dir: {output} is not empty; name a new folder")
    merge(folder, output, options.dtype)
    print(f"The merged model is in {output}")


def merge(adapter: Path, output_dir: Path, dtype: str) -> None:
    """Write base model plus adapter.

    Args:
        adapter: Folder of the adapter; its config names the base.
        output_dir: Where the model goes.
        dtype: Of the weights written; the sum is made in float32.

    Raises:
        ValueError: The adapter cannot be merged.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    from ebft.pretrained import load_config, read_weights

    if not (adapter / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{adapter}: no adapter_model.safetensors: only safetensors are read, since a pickle can run code"
        )
    config = PeftConfig.from_pretrained(str(adapter))
    base, of_base = str(config.base_model_name_or_path), dict[str, Any](revision=config.revision)
    lm = read_weights(
        base, load_config(base, f"{adapter}: base_model_name_or_path", **of_base), torch.float32, of_base
    )
    model = PeftModel.from_pretrained(lm, adapter)
    if getattr(lm, "is_quantized", False):
        raise ValueError(
            f"{adapter}: its base {base} is stored in few bits, in which the sum would be rounded again: name the "
            "model it was made from, as base_model_name_or_path in adapter_config.json"
        )
    tokenizer = AutoTokenizer.from_pretrained(adapter if (adapter / "tokenizer_config.json").is_file() else base)
    _part_ends(lm)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{adapter}: this adapter cannot be merged: {error}") from error
    merged.to(getattr(torch, dtype)).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def _part_ends(lm: Any) -> None:
    """Give the LM head weights of its own where it shares the embeddings', and an adapter is on one of the two."""
    from torch import nn

    ends = lm.get_input_embeddings(), lm.get_output_embeddings()
    embeddings, head = (end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends)
    if (embeddings, head) != ends and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        lm.config.get_text_config().tie_word_embeddings = lm.config.tie_word_embeddings = False

"""The table of docs/scaling.md: what the script computes now, and its parts by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from ebft.communication import bytes_per_update

DOCS = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"


def test_document_has_the_tables_numbers(capsys):
    scaling.main([])
    assert capsys.readouterr().out.strip() in DOCS.read_text()


def test_a_row_is_the_plans_arithmetic():
    machine = scaling.Machine()
    row = scaling.need("Qwen2.5-7B", "full", 64, machine)
    run = replace(scaling.run_of("Qwen2.5-7B", "full"), processes=64, engine="fsdp2", gathers=True, sampled=1)
    assert (row.engine, row.documents, row.micro_batch) == ("fsdp2, gathered", 64, 1)
    assert row.held == run.memory(scaling.WORK.work(), 1)["total"] < machine.memory
    assert row.send == bytes_per_update(run, 1, 1)["total"] / machine.network
    assert row.hours == pytest.approx([x * 305 / 3600 for x in (row.send, row.send + row.compute)])
    three = scaling.operations_of_a_document(scaling.run_of("Qwen2.5-3B", "full"))
    seven = scaling.operations_of_a_document(scaling.run_of("Qwen2.5-7B", "full"))
    assert row.compute == pytest.approx(7.089 / 16 * seven / three)


def test_what_does_not_fit_says_so():
    small = scaling.need("Llama-3.1-70B", "full", 8, scaling.Machine())
    assert small.micro_batch == 0 and small.held > scaling.Machine().memory
    assert scaling.need("Qwen2.5-7B", "LoRA", 8, scaling.Machine()).engine == "ddp"

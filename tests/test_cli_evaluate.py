"""`ebft evaluate` on two small checkpoints: numbers, files, going on after an interruption, and what it refuses."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebft.cli import main
from ebft.data import load_documents, tokenize_documents
from ebft.evaluation import DocumentSettings, document_means
from ebft.evaluation.report import label, locked, save
from sandboxes import works
from stand_ins import comet_stand_in, harness_or_stand_in, own_task
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

LINES = ["the quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b\n", "two and two is four."]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two models with one tokenizer, raw text, answers with shared prompts, and a benchmark."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = byte_bpe_tokenizer()
    for seed, name in enumerate(("sft", "ebft")):
        tiny_model(seed=seed, scale=3.0, vocab_size=len(tokenizer), dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write(folder / "text.jsonl", [{"text": f"{line} {line}"} for line in LINES])
    asked = [{"prompt": "the quick brown", "completion": f" fox jumps over {i} dogs"} for i in range(3)]
    write(folder / "qa.jsonl", [*asked, {"prompt": "user: what is two", "completion": " and two? four."}])
    write(folder / "problems.jsonl", [{"id": "add", "prompt": "def add(a, b):\n", "tests": "assert add(1, 2) == 3"}])
    write(folder / "swiss.jsonl", [{"source": "Grueezi", "target": "hello", "direction": "gsw-en"}])
    write(folder / "long.jsonl", [{"translation": {"de": n * "x", "en": "y"}} for n in (1, 999)])
    write(folder / "columns.jsonl", [{"de": "Hund", "en": "dog"}])
    (folder / "pairs.txt").write_text("Hund dog")
    (folder / "three.tsv").write_text("Hund\tdog\t0.9\n")
    write(folder / "lists.jsonl", [["Hund"], {"source": "Hund", "target": "dog"}])
    write(folder / "mixed.jsonl", [{"text": "one two three"}, {"txt": "four"}])
    write(folder / "ids.jsonl", [{"input_ids": [99999, 1, 2]}])
    shutil.copytree(folder / "sft", folder / "hollow", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(folder / "sft", folder / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    broken = tiny_model(vocab_size=len(tokenizer), dtype=torch.float32)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(folder / "broken")
    tokenizer.save_pretrained(folder / "broken")
    write(folder / "pairs.jsonl", [{"translation": {"de": "der Hund", "en": "the dog"}} for _ in range(3)])
    return folder


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit(records: Path, **values) -> None:
    """Change all records of a file, not its settings in the first line."""
    first, *lines = records.read_text().splitlines()
    records.write_text("".join(f"{line}\n" for line in (first, *(json.dumps(json.loads(x) | values) for x in lines))))


@pytest.fixture
def run(workplace, tmp_path, monkeypatch, capsys):
    """Runs `ebft evaluate` in the workplace; exit status and what went to stderr."""
    monkeypatch.chdir(workplace)

    def run(*words: str, output: str = "out"):
        models = [] if "--model_name_or_path" in words else ["--model_name_or_path", "sft", "ebft"]
        status = main(["evaluate", *models, "--output_dir", str(tmp_path / output), *words])
        return status, capsys.readouterr()

    return run


DOCUMENTS = ("--dataset_name", "qa.jsonl", "--context_length", "3", "--lengths", "1", "2", "4", "--batch_size", "2")
TEXT_ALONE = ("--dataset_name", "qa.jsonl", "--metrics", "cross_entropy")
CODE = ("--code_benchmark", "problems.jsonl")
SHORT = ("--translation_direction", "de-en", "--max_new_tokens", "4")


def test_any_causal_model(run, workplace, tmp_path):
    """Also one that blocks refuse in training, and whose attention transformers has no fast form of."""
    tokenizer = byte_bpe_tokenizer()
    tiny_model("mamba", vocab_size=len(tokenizer)).save_pretrained(workplace / "state")
    tokenizer.save_pretrained(workplace / "state")
    words = ("--metrics", "cross_entropy", "feature_matching", "--plots", "false")
    status, printed = run("--model_name_or_path", "state", *DOCUMENTS, *words)
    assert status == 0, printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {"cross_entropy/answer", "feature_matching_loss"} <= {row["measure"] for row in results}


def test_documents_of_two_models(run, tmp_path, workplace):
    status, printed = run(*DOCUMENTS)
    assert status == 0, printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    numbers = {(row["model"], row["measure"], row["length"]): row for row in results["results"]}
    for name in ("sft", "ebft", "ebft - sft"):
        for measure in (f"feature_matching_{part}" for part in ("loss", "shared", "floor", "excess")):
            assert {length for model, m, length in numbers if (model, m) == (name, measure)} == {1, 2, 4}
        for measure in ("entropy/rollout", "entropy/reference", "cross_entropy/reference"):
            assert {length for model, m, length in numbers if (model, m) == (name, measure)} == {1, 2, 3, 4}
        for measure in ("cross_entropy/all", "cross_entropy/answer", "duplicate_rate", "distinct_2"):
            assert (name, measure, None) in numbers
    assert all(row["low"] <= row["mean"] <= row["high"] for row in numbers.values())
    sft, ebft = (numbers[name, "perplexity/all", None]["mean"] for name in ("sft", "ebft"))
    assert numbers["ebft - sft", "perplexity_ratio/all", None]["mean"] == pytest.approx(ebft / sft)
    assert numbers["sft", "feature_matching_floor", 4]["mean"] == numbers["ebft", "feature_matching_floor", 4]["mean"]
    assert results["feature_network"]["name"] == "sft"
    assert len(results["feature_network"]["sha256"]) == 64

    tokenizer = byte_bpe_tokenizer()
    rows = list(tokenize_documents(load_documents(str(workplace / "qa.jsonl")), tokenizer, max_length=64))
    model = tiny_model(seed=1, scale=3.0, vocab_size=len(tokenizer), dtype=torch.float32)
    alone = document_means(model, None, rows, DocumentSettings(("cross_entropy",)))["cross_entropy/answer"]
    expected = alone.estimate().mean.item()
    assert numbers["ebft", "cross_entropy/answer", None]["mean"] == pytest.approx(expected, abs=1e-5)

    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(results["results"])
    for name in ("feature_matching", "calibration", "scores"):
        assert (tmp_path / "out" / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "out" / "plots" / f"{name}.svg").read_bytes()
    assert "Paired differences" in printed.out


def test_documents_under_other_kernels(run, tmp_path):
    words = (*DOCUMENTS, "--metrics", "feature_matching", "--kernels", "rbf", "energy", "characteristic", "ngram")
    status, printed = run(*words)
    assert status == 0, printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["kernels"]["rbf"]["bandwidth"] == results["kernels"]["characteristic"]["bandwidth"] > 0
    assert results["config"]["kernels"] == ["rbf", "energy", "characteristic", "ngram"] == list(results["kernels"])
    lengths = {}
    for row in results["results"]:
        lengths.setdefault((row["model"], row["measure"]), set()).add(row["length"])
    for name in ("sft", "ebft", "ebft - sft"):
        for suffix in ("", "/rbf", "/energy", "/characteristic", "/ngram"):
            assert lengths[name, f"feature_matching_loss{suffix}"] == {1, 2, 4}
            assert lengths[name, f"feature_matching_excess{suffix}"] == {1, 2, 4}
    assert "feature matching loss, ngram, length 4" in printed.out
    (tmp_path / "out" / "results.json").unlink()
    assert run(*words)[0] == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again == results
    status, printed = run(*words[:-1])
    assert status == 2 and "kernels" in printed.err


def test_records_without_kernels_are_as_before(run, tmp_path):
    assert run(*DOCUMENTS, "--metrics", "feature_matching")[0] == 0
    settings = json.loads((tmp_path / "out" / "records" / "sft-documents.jsonl").read_text().splitlines()[0])
    assert "kernels" not in settings and "kernels" not in json.loads((tmp_path / "out" / "results.json").read_text())


def test_documents_of_one_prompt_are_resampled_together(run, workplace, tmp_path):
    """Also where the end of the prompt and the answer are one token, and the tokens before it differ."""
    rows = [{"prompt": "the quick brown fo", "completion": text} for text in ("x jumps over the dog", "es jump over")]
    write(workplace / "merged.jsonl", [*rows, {"prompt": "the lazy", "completion": " dog sleeps"}])
    with pytest.warns(UserWarning, match="1 document.* whose tokenised prompt does not begin"):
        status, printed = run("--dataset_name", "merged.jsonl", *DOCUMENTS[2:], "--plots", "false")
    assert status == 0, printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {row["units"] for row in results if row["measure"] == "cross_entropy/answer"} == {2}
    assert not [row for row in results if "floor" in row["measure"]], "the two references start at other places"


def test_interrupted_it_goes_on_where_it_stopped(run, tmp_path):
    assert run(*DOCUMENTS)[0] == 0
    whole = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    records = tmp_path / "out" / "records" / "ebft-documents.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    kept = json.loads(lines[1])
    kept["cross_entropy/all"][0] += 1000.0  # a mark: it must not be measured again
    records.write_bytes(lines[0] + json.dumps(kept).encode() + b"\n" + lines[2][:20])
    assert run(*DOCUMENTS)[0] == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    for one, other in zip(whole, again, strict=True):
        if "all" not in one["measure"] or one["model"] == "sft":
            assert one == pytest.approx(other, abs=1e-6) if one["model"] != "sft" else one == other
    assert max(row["mean"] for row in again if row["measure"] == "cross_entropy/all") > 10


def test_other_settings_are_not_mixed(run):
    assert run(*TEXT_ALONE)[0] == 0
    status, printed = run(*TEXT_ALONE, "--seed", "1")
    assert status == 2 and "other settings (seed 0 -> 1)" in printed.err


def test_another_state_of_a_model_is_not_mixed(run, workplace, tmp_path):
    """Records are of the files they were made from, config.json among them."""
    shutil.copytree(workplace / "sft", workplace / "changed")
    words = ("--model_name_or_path", "changed", "--dataset_name", "qa.jsonl", "--metrics", "cross_entropy")
    assert run(*words)[0] == 0
    (tmp_path / "out" / "results.json").unlink()
    config = json.loads((workplace / "changed" / "config.json").read_text())
    (workplace / "changed" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    status, printed = run(*words)
    assert status == 2 and "other settings (files of the model)" in printed.err


def test_records_of_a_later_model_are_checked_before_any_work(run, tmp_path):
    assert run(*TEXT_ALONE)[0] == 0
    (tmp_path / "out" / "results.json").unlink()
    records = tmp_path / "out" / "records"
    (records / "sft-documents.jsonl").unlink()
    first, rest = (records / "ebft-documents.jsonl").read_text().split("\n", 1)
    changed = json.dumps(json.loads(first) | {"state": "another"})
    (records / "ebft-documents.jsonl").write_text(f"{changed}\n{rest}")
    status, printed = run(*TEXT_ALONE)
    assert status == 2 and "other settings (files of the model)" in printed.err
    assert len((records / "sft-documents.jsonl").read_text().splitlines()) == 1, "nothing is measured before"


def test_another_batch_size_goes_on(run, tmp_path):
    """No number of documents, nor a greedy completion, depends on it; the noise of sampling does."""
    greedy = ("--translation", "pairs.jsonl", "--translation_direction", "de-en", "--max_new_tokens", "4")
    sampled = (*greedy, "--best_of", "2")
    for words, output, allowed in ((DOCUMENTS, "a", True), (greedy, "b", True), (sampled, "c", False)):
        assert run(*words, output=output)[0] == 0
        for _ in range(2):
            status, printed = run(*words, "--batch_size", "3", "--generation_batch_size", "1", output=output)
            assert (status == 0) == allowed, printed.err
            assert allowed or "batch_size 64 -> 1" in printed.err
            (tmp_path / output / "results.json").unlink(missing_ok=True)  # then the records decide


def test_other_references_are_not_mixed(run, workplace, tmp_path):
    write(workplace / "own.jsonl", [{"source": "Hund", "target": "dog", "direction": "de-en"}])
    words = ("--translation", "own.jsonl", "--max_new_tokens", "2", "--plots", "false")
    assert run(*words)[0] == 0
    write(workplace / "own.jsonl", [{"source": "Hund", "target": "hound", "direction": "de-en"}])
    status, printed = run(*words)
    assert status == 2 and "other settings (the documents, problems or segments)" in printed.err


def test_a_damaged_record_is_named_and_nothing_is_lost(run, tmp_path):
    assert run(*TEXT_ALONE)[0] == 0
    records = tmp_path / "out" / "records" / "ebft-documents.jsonl"
    first, *rest = whole = records.read_text().splitlines(keepends=True)
    for lines, place in (
        ([first, "{oops\n", *rest], "line 2"),
        ([first, "{}\n"], "line 2"),
        ([first, '{"id": 0, "verdicts": []}\n'], "line 2"),
        (["3\n"], "line 1"),
    ):
        records.write_text("".join(lines))
        status, printed = run(*TEXT_ALONE)
        assert status == 2 and f"ebft-documents.jsonl, {place}: no record of an evaluation: delete th" in printed.err
        assert records.read_text() == "".join(lines)
    records.write_text("".join(whole))
    assert run(*TEXT_ALONE)[0] == 0


def test_what_is_in_the_way_is_told_before_any_work(run, tmp_path):
    for name, folder in (("results.json", True), ("results.csv", True), ("records", False), ("plots", False)):
        place = tmp_path / f"with_{name}" / name
        place.parent.mkdir()
        place.mkdir() if folder else place.write_text("")
        status, printed = run(*TEXT_ALONE, output=place.parent.name)
        assert status == 2 and f"output_dir: {place} is in the way" in printed.err, printed.err


def test_one_call_at_a_time_in_a_folder(run, tmp_path):
    """The same command twice would measure, and keep, everything twice."""
    with locked(tmp_path / "out"):
        status, printed = run(*TEXT_ALONE)
        assert status == 2 and "another `ebft evaluate` is at work there" in printed.err
    assert run(*TEXT_ALONE)[0] == 0


@pytest.mark.filterwarnings("ignore:.*paired difference")
def test_a_model_is_added_to_a_finished_folder(run, tmp_path):
    """Without results.json, and then only the new one is measured."""
    assert run("--model_name_or_path", "sft", *TEXT_ALONE)[0] == 0
    status, printed = run(*TEXT_ALONE)
    assert status == 2 and "delete results.json alone: the records stay" in printed.err
    (tmp_path / "out" / "results.json").unlink()
    mark = {"cross_entropy/all": [5000.0, 1.0]}
    edit(tmp_path / "out" / "records" / "sft-documents.jsonl", **mark)
    assert run(*TEXT_ALONE)[0] == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    numbers = {row["model"]: row["mean"] for row in results if row["measure"] == "cross_entropy/all"}
    assert numbers["sft"] == 5000 and numbers["ebft"] < 100


def test_half_written_results_are_named(run, tmp_path):
    (tmp_path / "out").mkdir()
    for text in ('{"config": {"see', "[]"):
        (tmp_path / "out" / "results.json").write_text(text)
        status, printed = run(*TEXT_ALONE)
        assert status == 2 and "results.json holds no results of an evaluation" in printed.err
    (tmp_path / "out" / "results.json").unlink()
    assert run(*TEXT_ALONE)[0] == 0
    assert not list((tmp_path / "out").glob("*.unfinished"))


def test_results_within_the_folder_of_a_model(run, workplace):
    words = ("--model_name_or_path", "ebft", "--dataset_name", "qa.jsonl", "--metrics", "cross_entropy")
    for _ in range(2):
        status, printed = run(*words, "--output_dir", "ebft/evaluation")
        assert status == 0, printed.err
    shutil.rmtree(workplace / "ebft" / "evaluation")


def test_texts_too_short_for_a_rollout_have_a_cross_entropy(run, workplace):
    write(workplace / "short.jsonl", [{"text": "a fox"}, {"text": "a dog"}])
    assert run("--dataset_name", "short.jsonl", "--metrics", "cross_entropy")[0] == 0
    status, printed = run("--dataset_name", "short.jsonl", output="other")
    assert status == 2 and "no document has a token behind a prefix of context_length=8" in printed.err


def test_raw_text_and_lengths_that_fit(run, tmp_path):
    with pytest.warns(UserWarning, match="half of the documents have no room"):
        status, printed = run("--dataset_name", "text.jsonl", "--metrics", "feature_matching", "--plots", "false")
    assert status == 0, printed.err
    assert not (tmp_path / "out" / "plots").exists()


@pytest.mark.skipif(
    not (works("bubblewrap") or works("namespaces")), reason="needs bubblewrap (apt-get install bubblewrap)"
)
def test_code_and_translation(run, tmp_path):
    """Both tasks from end to end; a model that knows nothing passes nothing and translates badly, honestly counted."""
    options = ("--num_samples", "3", "--pass_at_k", "1", "2", "--max_new_tokens", "6", "--best_of", "2")
    tasks = ("--code_benchmark", "problems.jsonl", "--translation", "pairs.jsonl", "--translation_direction", "de-en")
    status, printed = run(*tasks, *options)
    assert status == 0, printed.err
    assert "Generated code runs in" in printed.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    numbers = {(row["model"], row["measure"]): row["mean"] for row in results}
    for k in (1, 2):
        assert numbers["ebft", f"problems.jsonl/sampled/pass@{k}"] == 0
    assert numbers["sft", "problems.jsonl/greedy/pass@1"] == 0
    assert 0 <= numbers["sft", "de-en/BLEU (first)"] <= 100
    records = (tmp_path / "out" / "records" / "sft-code-problems.jsonl-sampled.jsonl").read_text().splitlines()
    assert len(json.loads(records[1])["samples"]) == 3 == len(json.loads(records[1])["verdicts"])
    pairs = {row["measure"]: row for row in results if row["model"] == "ebft - sft"}
    assert 0 < pairs["de-en/chrF (first)"]["p_value"] <= 1 and "p = " in printed.out
    shutil.rmtree(tmp_path / "out" / "plots")
    assert run(*tasks, *options)[0] == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == results

    # Marks in the records: nothing is written, run or translated again, and a difference has the right sign.
    edit(tmp_path / "out" / "records" / "ebft-translation-greedy.jsonl", hypotheses=["the dog"])
    edit(tmp_path / "out" / "records" / "ebft-code-problems.jsonl-greedy.jsonl", verdicts=["passed"])
    assert run(*tasks, *options)[0] == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    numbers = {(row["model"], row["measure"]): row["mean"] for row in results}
    assert numbers["ebft", "de-en/chrF (first)"] == pytest.approx(100)
    difference = numbers["ebft - sft", "de-en/chrF (first)"]
    assert difference == pytest.approx(100 - numbers["sft", "de-en/chrF (first)"]) and difference > 50
    assert numbers["ebft - sft", "problems.jsonl/greedy/pass@1"] == 1
    assert numbers["ebft", "de-en/sentence BLEU (first)"] == pytest.approx(100)


@pytest.mark.skipif(
    not (works("bubblewrap") or works("namespaces")), reason="needs bubblewrap (apt-get install bubblewrap)"
)
def test_a_benchmark_called_translation(run, workplace, tmp_path):
    """Its records are not those of the translations."""
    (tmp_path / "translation").mkdir()
    shutil.copy(workplace / "problems.jsonl", tmp_path / "translation" / "test.jsonl")
    words = ("--translation", "pairs.jsonl", "--translation_direction", "de-en", "--max_new_tokens", "2")
    status, printed = run(*words, "--code_benchmark", str(tmp_path / "translation"), "--plots", "false")
    assert status == 0, printed.err
    names = {path.name for path in (tmp_path / "out" / "records").iterdir()}
    assert {"sft-translation-greedy.jsonl", "sft-code-translation-greedy.jsonl"} <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "dataset_name, code_benchmark, translation, tasks: all are missing"),
        (("--model_name_or_path", "sft", "sft", "--dataset_name", "qa.jsonl"), "two are called alike"),
        (("--model_name_or_path", "nothing", "--dataset_name", "qa.jsonl"), "model_name_or_path='nothing'"),
        (("--dataset_name", "nothing.jsonl"), "dataset_name='nothing.jsonl': no such file"),
        (("--dataset_name", "qa.jsonl", "--metrics", "bleu"), "metrics=['bleu']: use some of"),
        (("--dataset_name", "qa.jsonl", "--lengths", "512"), "the longest completion that fits is"),
        (("--dataset_name", "qa.jsonl", "--metric", "x"), "unknown option metric; did you mean metrics?"),
        (("--dataset_name", "qa.jsonl", "--dtype", "int8"), "dtype='int8'"),
        (("--code_benchmark", "problems.jsonl", "--pass_at_k", "4"), "pass_at_k=4 is larger than"),
        (("--code_benchmark", "qa.jsonl"), "qa.jsonl"),
        (("--code_benchmark", "problems.jsonl", "problems.jsonl"), "two are called alike"),
        (("--code_benchmark", "problems.jsonl", "--max_new_tokens", "0"), "max_new_tokens=0"),
        (("--code_benchmark", "problems.jsonl", "--max_new_tokens", "999"), "exceed the model's 256 positions"),
        (
            ("--code_benchmark", "problems.jsonl", "--num_samples", "2", "--code_temperature", "0"),
            "code_temperature=0.0 must be above 0",
        ),
        pytest.param(
            ("--dataset_name", "qa.jsonl", "--device", "cuda"),
            "device='cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("--dataset_name", "qa.jsonl", "--device", "abacus"), "device='abacus' is unknown"),
        (("--dataset_name", "qa.jsonl", "--seed", "-1"), "seed=-1"),
        (("--translation", "pairs.jsonl", "--translation_direction", "de-fr"), "fr"),
        (("--translation", "pairs.jsonl", "--translation_template", "say {word}"), "translation_template"),
        (("--code_benchmark", "problems.jsonl", "--generation_engine", "tgi"), "use transformers or vllm"),
        (("--code_benchmark", "problems.jsonl", "--vllm_gpu_memory_utilization", "1.5"), "must be in (0, 1]"),
        (("--dataset_name", "qa.jsonl", "--comet"), "comet=True needs --translation"),
        (("--dataset_name", "qa.jsonl", "--best_of", "4"), "best_of=4 needs --translation"),
        (("--translation", "pairs.jsonl", "--lengths", "4"), "lengths=[4] needs --dataset_name"),
        (("--translation", "pairs.jsonl", "--temperature", "0.6"), "temperature=0.6 needs --dataset_name"),
        (("--translation", "pairs.jsonl", "--comet_model", "other"), "comet_model='other' needs --comet"),
        (("--translation", "pairs.jsonl", "--time_limit", "3"), "time_limit=3.0 needs --code_benchmark"),
        (("--translation", "pairs.jsonl", "--code_temperature", "0.3"), "code_temperature=0.3 needs --num_samples or"),
        ((*TEXT_ALONE, "--lengths", "4"), "lengths=[4] needs one of --metrics feature_matching"),
        ((*TEXT_ALONE, "--kernels", "rbf"), "kernels=['rbf'] needs --metrics feature_matching"),
        (("--translation", "pairs.jsonl", "--kernels", "rbf"), "kernels=['rbf'] needs --dataset_name"),
        (("--dataset_name", "qa.jsonl", "--kernels", "linear"), "kernels=['linear']: use each of rbf, energy"),
        ((*TEXT_ALONE, "--feature_norm", "none"), "feature_norm='none' needs --metrics feature_matching"),
        (("--dataset_name", "qa.jsonl", "--max_new_tokens", "9"), "max_new_tokens=9 needs --code_benchmark or"),
        (("--dataset_name", "mixed.jsonl"), "mixed.jsonl, line 2 has the columns []"),
        (("--dataset_name", "ids.jsonl"), "dataset_name='ids.jsonl', row 0: `input_ids` has 99999"),
        (("--output_dir", "/proc/results", "--dataset_name", "qa.jsonl"), "output_dir='/proc/results' cannot be made"),
        (("--output_dir", "/proc", "--dataset_name", "qa.jsonl"), "output_dir='/proc' cannot be made or written to"),
        (("--dataset_name", "qa.jsonl", "--max_length", "0"), "max_length=0 must be at least 1"),
        (("--translation", "swiss.jsonl"), "swiss.jsonl, line 1: direction='gsw-en': no name of the language 'gsw'"),
        (("--translation", "swiss.jsonl", "--language_names", "gsw"), "'gsw' is not CODE=NAME"),
        (
            ("--translation", "long.jsonl", "--translation_direction", "de-en", "--max_new_tokens", "4"),
            "long.jsonl, line 2: its prompt of",
        ),
        (("--model_name_or_path", "sft", "hollow", "--dataset_name", "qa.jsonl"), "hollow holds no weights"),
        ((*CODE, "--num_samples", "2", "--code_temperature", "nan"), "code_temperature=nan must be above 0"),
        ((*CODE, "--num_samples", "2", "--code_temperature", "inf"), "code_temperature=inf must be above 0"),
        ((*CODE, "--num_samples", "0"), "num_samples=0 must be at least 1"),
        ((*CODE, "--generation_batch_size", "0"), "generation_batch_size=0 must be at least 1"),
        ((*CODE, "--time_limit", "0"), "time_limit=0.0 must be above 0"),
        ((*CODE, "--time_limit", "nan"), "time_limit=nan must be above 0"),
        ((*CODE, "--code_benchmark_config", "x"), "code_benchmark_config='x' does nothing: code_benchmark=['prob"),
        (("--dataset_name", "qa.jsonl", "--temperature", "nan"), "temperature=nan must be above 0"),
        (("--dataset_name", "qa.jsonl", "--temperature", "inf"), "temperature=inf must be above 0"),
        (("--dataset_name", "qa.jsonl", "--seed", str(2**64)), f"seed={2**64} must be"),
        (("--dataset_name", "qa.jsonl", "--feature_layers", "nan"), "feature_layers=[nan]: nan is out of range"),
        (("--dataset_name", "qa.jsonl", "--feature_layers", "half"), "feature_layers: 'half' is not a number"),
        (("--dataset_name", "qa.jsonl", "--feature_layers", "9"), "feature_layers=[9]: 9 is out of range"),
        (("--dataset_name", "qa.jsonl", "--feature_layers", "0.5", "0.5"), "feature_layers=[0.5, 0.5]: one is there"),
        (("--dataset_name", "qa.jsonl", "--dataset_test_split", "x"), "dataset_test_split='x' does nothing"),
        (("--translation", "pairs.jsonl", "--translation_split", "x"), "translation_split='x' does nothing"),
        (
            ("--translation", "swiss.jsonl", "--language_names", "gsw=a", "fy=b"),
            "no segment is in 'fy', only in ['en'",
        ),
        (
            ("--translation", "pairs.jsonl", "--translation_template", "{source!z}"),
            "translation_template='{source!z}'",
        ),
        (("--translation", "columns.jsonl"), "which of ['de', 'en'] is the source? Say it with --translation_direct"),
        (("--translation", "pairs.txt"), "translation='pairs.txt' is no .tsv, .jsonl"),
        (("--translation", "three.tsv"), "3 column(s) where source and target are expected: keep these"),
        (("--translation", "lists.jsonl"), "line 1 begins a list"),
        (
            ("--dataset_name", "qa.jsonl", "--feature_model_name_or_path", "hollow"),
            "feature_model_name_or_path: hollow holds no weights",
        ),
        (("--model_name_or_path", "sft", "mute", "--dataset_name", "qa.jsonl"), "model_name_or_path: mute has no tok"),
    ],
)
def test_what_it_refuses(run, tmp_path, words, message):
    status, printed = run(*words)
    assert status == 2
    assert message in printed.err, printed.err
    assert not (tmp_path / "out" / "records").exists(), "found before anything is measured"


@pytest.mark.parametrize("data", [DOCUMENTS, ("--translation", "pairs.jsonl", *SHORT)])
def test_a_model_with_weights_that_are_no_numbers(run, tmp_path, data):
    """Its rollouts are tokens like any other's, and would have a finite feature-matching loss."""
    status, printed = run("--model_name_or_path", "broken", *data)
    assert status == 2 and "broken: the weight model.layers.1.mlp.up_proj.weight holds NaN" in printed.err
    assert not (tmp_path / "out" / "results.json").exists()


def test_results_are_json_whatever_a_task_says(tmp_path):
    row = dict(model="a", measure="task/perplexity", length=None, mean=float("inf"), low=None, high=None)
    save(tmp_path, [row], {})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["results"][0]["mean"] is None


@pytest.mark.parametrize(("layers", "read"), [(("2",), "2"), (("1", "1.0"), "1,4"), (("0.5", "3"), "2,3")])
def test_layers_are_indices_or_fractions(run, tmp_path, layers, read):
    words = ("--metrics", "feature_matching", "--plots", "false", "--feature_layers", *layers)
    assert run(*DOCUMENTS, *words)[0] == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["feature_network"]["layers"] == read


def test_names_of_languages(run):
    words = (
        "--translation",
        "swiss.jsonl",
        "--max_new_tokens",
        "2",
        "--language_names",
        " gsw = Swiss German ",
    )
    status, printed = run(*words)
    assert status == 0, printed.err
    # The name is part of the prompt, and so of what the records are of.
    status, printed = run(*words[:5], "gsw=Alemannic")
    assert status == 2 and "language_names" in printed.err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_where_it_is_not_installed(run):
    status, printed = run("--translation", "pairs.jsonl", "--generation_engine", "vllm")
    assert status == 2 and "pip install 'ebft[vllm]'" in printed.err


def test_comet_is_scored_once_and_compared(run, tmp_path, monkeypatch):
    """A small package of our own stands where COMET would be, in a Python of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("--translation", "pairs.jsonl", "--translation_direction", "de-en", "--max_new_tokens", "4", "--comet")
    status, printed = run(*words)
    assert status == 2 and "comet: it has no environment at" in printed.err and "make it once with" in printed.err
    environment = comet_stand_in(tmp_path / "ebft" / "comet")
    words += ("--comet_model", "known")
    status, printed = run(*words)
    assert status == 0, printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    numbers = {row["model"]: row for row in results if row["measure"] == "de-en/COMET (first)"}
    assert numbers.keys() == {"sft", "ebft", "ebft - sft"}
    assert (numbers["sft"]["mean"], numbers["sft"]["units"]) == (len("der Hund"), 3)
    # Another COMET is refused before anything is translated, also where only records are left.
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "records" / "sft-translation-greedy.jsonl").unlink()
    status, printed = run(*words[:-1], "another")
    assert status == 2 and "comet 'known' -> 'another'" in printed.err
    assert len((tmp_path / "out" / "records" / "sft-translation-greedy.jsonl").read_text().splitlines()) == 1
    assert run(*words)[0] == 0
    shutil.rmtree(environment)
    (tmp_path / "ebft" / "comet" / "bin").mkdir(parents=True)
    python = tmp_path / "ebft" / "comet" / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$2" = -c ]\n')  # it imports COMET, and would fail if it were to score again
    python.chmod(0o755)
    assert run(*words)[0] == 0


def test_tasks_that_cannot_be_run_are_refused_before_any_work(run, workplace, tmp_path, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    text = own_task(tmp_path).read_text()
    (tmp_path / "code.yaml").write_text(text + "unsafe_code: true\n")
    (tmp_path / "lost.yaml").write_text(text.replace("rows.json", "nosuch.json"))
    words = ("--dataset_name", "qa.jsonl", "--metrics", "cross_entropy", "--tasks")
    with harness_or_stand_in(tmp_path / "site"):
        for name, message in (("code", "['ours'] run generated code on this machine"), ("lost", "cannot be loaded (")):
            status, printed = run(*words, str(tmp_path / f"{name}.yaml"), output=name)
            assert status == 2 and message in printed.err, printed.err
            assert "documents" not in printed.out, "nothing is measured before"


def test_tasks_of_the_harness(run, workplace, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (the extra `lm-eval`)")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    task = own_task(workplace)
    status, printed = run("--tasks", str(task))
    assert status == 0, printed.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    numbers = {row["model"]: row for row in results if row["measure"] == "ours/acc"}
    assert numbers.keys() == {"sft", "ebft", "ebft - sft"} and numbers["sft"]["units"] == 3
    assert run("--tasks", str(task))[0] == 0
    task.write_text(task.read_text() + "description: another\n")
    status, printed = run("--tasks", str(task))
    assert status == 2 and "other settings (files" in printed.err
    status, printed = run("--tasks", "nosuch", output="other")
    assert status == 2 and "does not know ['nosuch']" in printed.err


def test_models_with_different_tokenizers(run, workplace):
    shutil.copytree(workplace / "sft", workplace / "other")
    tokenizer = byte_bpe_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(workplace / "other")
    status, printed = run("--model_name_or_path", "sft", "other", "--dataset_name", "qa.jsonl")
    assert status == 2 and "other has another vocabulary than sft" in printed.err
    options = ("--model_name_or_path", "sft", "--feature_model_name_or_path", "other", "--dataset_name", "qa.jsonl")
    status, printed = run(*options)
    assert status == 2 and "feature_model_name_or_path='other' has another vocabulary" in printed.err


ONE = ("--model_name_or_path", "x")


@pytest.mark.parametrize("words", [("--modl", "x"), ONE, (*ONE, "--tasks", "y", "--seed", "-1")])
def test_a_wrong_option_is_told_without_torch(words):
    code = (
        "import sys; from ebft.cli import main; status = main(['evaluate', *sys.argv[1:]]); "
        "assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys(); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr


def test_names_of_benchmarks_stay_as_they_are():
    assert label({"measure": "cross_entropy/all", "length": None}) == "cross entropy, all"
    assert label({"measure": "mbpp_train.jsonl/greedy/pass@1", "length": None}) == "mbpp_train.jsonl, greedy, pass@1"

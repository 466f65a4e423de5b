"""What the plots of an evaluation show: which curves, what they are called, and their numbers."""

import pytest

from ebft.evaluation import report

plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib (the extra `plot`)")


def row(model, measure, length, mean, units=7):
    return dict(model=model, measure=measure, length=length, mean=mean, low=mean - 1, high=mean + 1, units=units)


def drawn(axis) -> dict:
    """Label -> (x, y, style) of each curve."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()), line.get_linestyle())
        for line in axis.get_lines()
        if not str(line.get_label()).startswith("_")
    }


@pytest.fixture
def rows():
    names = ("a", "b", "b - a")
    return [row(n, "feature_matching_loss", k, 10 * i + k) for i, n in enumerate(names) for k in (1, 2)]


def test_losses_and_differences(rows):
    figure = report._curves(plt, rows, ["a", "b"])
    assert drawn(figure.axes[0]) == {"a": ([1, 2], [1, 2], "-"), "b": ([1, 2], [11, 12], "-")}
    assert drawn(figure.axes[1]) == {"b - a": ([1, 2], [21, 22], "-")}
    plt.close(figure)


def test_a_floor_is_drawn_with_the_losses_behind_those_prompts(rows):
    """Beside the loss of all documents, which one prompt with several references must not take the place of."""
    for name in ("a", "b"):
        rows += [row(name, "feature_matching_shared", k, 3 * k, units=2) for k in (1, 2)]
        rows += [row(name, "feature_matching_floor", k, k / 2, units=2) for k in (1, 2)]
    figure = report._curves(plt, rows, ["a", "b"])
    curves = drawn(figure.axes[0])
    assert curves["a"] == ([1, 2], [1, 2], "-")
    assert curves["b, 2 prompts with several references"] == ([1, 2], [3, 6], ":")
    assert curves["variance of those references: the floor"] == ([1, 2], [0.5, 1.0], "--")
    assert len(curves) == 5
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == set(curves)
    plt.close(figure)


def test_calibration_of_each_model():
    measures = ("entropy/rollout", "cross_entropy/reference", "entropy/reference")
    rows = [row(n, m, k, i + k) for n in "ab" for i, m in enumerate(measures) for k in (1, 2, 3)]
    figure = report._calibration(plt, rows, ["a", "b"])
    for axis, name in zip(figure.axes, "ab", strict=True):
        assert axis.get_title() == name
        curves = drawn(axis)
        assert curves["entropy of what it writes"][1] == [1, 2, 3]
        assert curves["cross-entropy on the text"][1] == [2, 3, 4]
        assert curves["entropy on the text"][1] == [3, 4, 5]
    plt.close(figure)


def test_nothing_measured_draws_nothing():
    assert (
        report._curves(plt, [], ["a"]) is report._calibration(plt, [], ["a"]) is report._bars(plt, [], ["a"]) is None
    )


def test_long_names_stay_apart_and_within_the_figure():
    names = ["Qwen2.5-1.5B-Instruct-sft-lr1e-5", "Qwen2.5-1.5B-Instruct-ebft-lr1e-5", "a-model-" * 9]
    measures = [f"humaneval-js-reworded-2025.jsonl/{kind}/pass@16" for kind in ("greedy", "sampled")]
    rows = [row(n, m, None, 0.5) for n in names for m in measures]
    figure = report._bars(plt, rows, names)
    figure.canvas.draw()
    titles = [axis.title.get_window_extent() for axis in figure.axes]
    assert not titles[0].overlaps(titles[1])
    for box in (*titles, *(text.get_window_extent() for axis in figure.axes for text in axis.get_xticklabels())):
        assert figure.bbox.padded(2).containsx(box.x0) and figure.bbox.padded(2).containsx(box.x1)
    plt.close(figure)

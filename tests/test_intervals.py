"""Bootstrap intervals over documents: against all draws enumerated, their coverage, and what pairing cancels."""

import itertools

import pytest
import torch

from ebft.evaluation import DocumentMean, intervals


def test_interval_resamples_whole_documents():
    """With three documents the bootstrap distribution is known: 27 equally likely draws."""
    data = DocumentMean(torch.tensor([3.0, 10.0, 40.0]), torch.tensor([1.0, 2.0, 4.0]))
    draws = list(itertools.product(range(3), repeat=3))
    means = torch.tensor([data.sums[list(d)].sum() / data.counts[list(d)].sum() for d in draws]).double()
    estimate = data.estimate(level=0.5, resamples=20_000)
    assert estimate.mean.item() == pytest.approx(53 / 7)
    # The quantiles of a discrete distribution: the sampled ones lie at or next to them.
    for found, q in ((estimate.low, 0.25), (estimate.high, 0.75)):
        assert means.quantile(q - 0.04) <= found <= means.quantile(q + 0.04)


def test_interval_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 60, generator=generator, dtype=torch.float64)
    estimates = [DocumentMean(row, torch.ones(60)).estimate(resamples=400) for row in data]
    covered = sum(bool(e.low <= 0 <= e.high) for e in estimates)
    assert 0.90 * 400 <= covered <= 0.98 * 400  # four standard errors around .94


def test_difference_is_paired():
    """What two models share cancels: the interval of the difference is as narrow as the difference is constant."""
    generator = torch.Generator().manual_seed(0)
    shared, counts = torch.randn(50, generator=generator, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    one, other = DocumentMean(shared + 0.25, counts), DocumentMean(shared, counts)
    assert [x.item() for x in (one - other).estimate()] == pytest.approx([0.25] * 3)
    assert (one.estimate().high - one.estimate().low) > 0.3
    with pytest.raises(ValueError, match="same documents"):
        _ = one - DocumentMean(shared, 2 * counts)


@pytest.mark.parametrize("documents", [17, 21, 34, 37, 44])
def test_interval_of_equal_documents_holds_the_mean(documents):
    for value in (1 / 3, 0.2, 0.3, 0.9):
        sums = torch.full((documents,), value, dtype=torch.float64)
        mean, low, high = DocumentMean(sums, torch.ones(documents)).estimate()
        assert low <= mean <= high


def test_empty_mean_is_an_error():
    with pytest.raises(ValueError, match="counts are all zero"):
        DocumentMean(torch.zeros(2), torch.zeros(2)).estimate()


def test_resamples_in_pieces_are_the_same_resamples(monkeypatch):
    """To the last bit what one array of all of them gives."""
    generator = torch.Generator().manual_seed(1)
    # Whole numbers, so that no order of summing matters.
    sums, counts = (torch.randint(1, 99, size, generator=generator).double() for size in ((40, 3), (40,)))
    drawn = torch.randint(40, (2000, 40), generator=torch.Generator().manual_seed(5))
    weights = torch.nn.functional.one_hot(drawn, 40).sum(1).double()
    means = (weights @ sums) / (weights @ counts)[:, None]
    tails = torch.tensor([(1 - 0.95) / 2, (1 + 0.95) / 2], dtype=torch.float64)
    for resamples_at_a_time in (3, 7, 1999, 2000):
        monkeypatch.setattr(intervals, "NUMBERS_AT_A_TIME", 40 * resamples_at_a_time + 1)
        found = DocumentMean(sums, counts).estimate(seed=5)
        assert torch.equal(torch.stack([found.low, found.high]), means.quantile(tails, dim=0))


def test_resamples_take_bounded_memory(monkeypatch):
    """No array of theirs has more numbers than are drawn at a time."""
    sizes = []
    draw = torch.randint

    def drawn(*args, **options):
        sizes.append(draw(*args, **options))
        return sizes[-1]

    monkeypatch.setattr(torch, "randint", drawn)
    monkeypatch.setattr(intervals, "NUMBERS_AT_A_TIME", 1000)
    DocumentMean(torch.randn(300), torch.ones(300)).estimate(resamples=50)
    assert sum(len(x) for x in sizes) == 50 and max(x.numel() for x in sizes) <= 1000

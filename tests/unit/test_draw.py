"""Drawing the next token: the distribution is the softmax's, and what may not be drawn never is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instant_reward.sampling.draw import Settings, draw, uniforms
from instant_reward.types import RunError, UserError

torch.set_num_threads(1)

END = 3
HIGHEST = 1 - 2**-53  # the largest float64 below 1; in float32 it is 1
GRID = 20_000


def some_logits(vocabulary: int = 50, rows: int = 1, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * scale
    )


def drawn(logits: Tensor, uniform: Any, forbid: bool = False, **settings: Any) -> tuple[Tensor, Tensor]:
    """Draws from copies of one row of logits, once for each uniform number."""
    numbers = torch.as_tensor(uniform, dtype=torch.float64).reshape(-1)
    rows = logits.expand(len(numbers), -1).clone()
    forbidden = torch.full((len(numbers),), forbid)
    return draw(rows, numbers, forbidden, (END,), Settings(**settings))


def grid() -> Tensor:
    return (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID


def expected(logits: Tensor, keep: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """The probabilities by the definition: softmax over what is kept."""
    kept = torch.ones_like(logits, dtype=torch.bool) if keep is None else keep
    return torch.where(kept, logits / temperature, -torch.inf).softmax(-1)


def assert_drawn_from(probabilities: Tensor, logits: Tensor, **settings: Any) -> None:
    """Over a grid of uniforms each token comes up as often as its probability says, give or take one."""
    tokens, logprobs = drawn(logits, grid(), **settings)
    counts = torch.bincount(tokens, minlength=logits.shape[-1])
    assert (counts - probabilities[0] * GRID).abs().max() <= 1.01
    assert torch.allclose(logprobs, probabilities[0].log()[tokens], rtol=0, atol=1e-12)


class TestDistribution:
    def test_it_is_the_softmax(self) -> None:
        logits = some_logits()
        assert_drawn_from(expected(logits), logits)

    @pytest.mark.parametrize("temperature", [0.3, 0.7, 1.6])
    def test_at_a_temperature(self, temperature: float) -> None:
        logits = some_logits()
        assert_drawn_from(expected(logits, temperature=temperature), logits, temperature=temperature)

    @pytest.mark.parametrize("top_k", [1, 2, 7, 50, 1000])
    def test_top_k_keeps_the_likeliest_and_renormalises(self, top_k: int) -> None:
        logits = some_logits()
        rank = logits.argsort(-1, descending=True).argsort(-1)
        assert_drawn_from(expected(logits, rank < top_k), logits, top_k=top_k)

    @pytest.mark.parametrize("top_p", [1e-9, 0.25, 0.5, 0.9, 0.999])
    def test_top_p_keeps_the_smallest_set_that_reaches_it(self, top_p: float) -> None:
        logits = some_logits()
        order = logits[0].argsort(descending=True)
        kept: list[int] = []
        mass = 0.0
        for token in order.tolist():  # by the definition, one by one
            if mass >= top_p:
                break
            kept.append(token)
            mass += float(logits.softmax(-1)[0, token])
        keep = torch.zeros_like(logits, dtype=torch.bool)
        keep[0, kept] = True
        assert_drawn_from(expected(logits, keep), logits, top_p=top_p)

    def test_top_k_and_top_p_and_temperature_together(self) -> None:
        """First the temperature, then the likeliest k, then the likeliest of these: the order of transformers."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        logits = some_logits()
        processors = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopKLogitsWarper(12), TopPLogitsWarper(0.8)])
        probabilities = processors(None, logits.clone()).softmax(-1)
        assert 1 < int((probabilities > 0).sum()) < 12
        assert_drawn_from(probabilities, logits, temperature=1.5, top_k=12, top_p=0.8)

    def test_forbidden_tokens_are_left_out_and_the_rest_is_renormalised(self) -> None:
        logits = some_logits()
        keep = torch.ones_like(logits, dtype=torch.bool)
        keep[0, END] = False
        assert_drawn_from(expected(logits, keep), logits, forbid=True)

    def test_only_the_rows_that_forbid_it_leave_the_end_token_out(self) -> None:
        logits = torch.zeros(2, 5, dtype=torch.float64)
        logits[:, END] = 100.0
        tokens, _ = draw(
            logits, torch.full((2,), 0.5, dtype=torch.float64), torch.tensor([True, False]), (END,), Settings()
        )
        assert tokens[0] != END
        assert tokens[1] == END

    def test_over_a_large_vocabulary_in_float32(self) -> None:
        """SmolLM2's vocabulary: each number falls between the cumulative probabilities around the token it drew."""
        logits = some_logits(49_152, dtype=torch.float32, scale=3.0)
        numbers = torch.cat([grid()[::100], torch.tensor([0.0, HIGHEST], dtype=torch.float64)])
        tokens, logprobs = drawn(logits, numbers)
        probabilities = logits.double().softmax(-1)[0]
        above = probabilities.cumsum(0)[tokens]
        assert len(set(tokens.tolist())) > 150
        assert bool((numbers <= above + 1e-6).all())
        assert bool((numbers >= above - probabilities[tokens] - 1e-6).all())
        assert torch.allclose(logprobs.double(), probabilities.log()[tokens], rtol=0, atol=1e-5)


class TestEdges:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("uniform", [0.0, 2**-60, 0.5, 1 - 2**-24, HIGHEST])
    @pytest.mark.parametrize(
        "possible", [[0], [49], [10, 30], list(range(1, 49))], ids=["first", "last", "two", "inner"]
    )
    def test_a_token_without_probability_is_never_drawn(
        self, possible: list[int], uniform: float, dtype: torch.dtype
    ) -> None:
        logits = torch.full((1, 50), -torch.inf, dtype=dtype)
        logits[0, possible] = some_logits(dtype=dtype)[0, possible]
        tokens, logprobs = drawn(logits, uniform)
        assert int(tokens) in possible
        assert torch.isfinite(logprobs).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("uniform", [0.0, HIGHEST])
    @pytest.mark.parametrize("end", [0, 49])
    def test_a_forbidden_end_token_is_never_drawn(self, end: int, uniform: float, dtype: torch.dtype) -> None:
        logits = some_logits(dtype=dtype)
        logits[0, end] = 60.0
        tokens, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), torch.tensor([True]), (end,), Settings())
        assert int(tokens) != end

    @pytest.mark.parametrize("uniform", [0.0, HIGHEST])
    @pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.3}], ids=str)
    def test_what_top_k_and_top_p_leave_out_is_never_drawn(self, settings: dict[str, Any], uniform: float) -> None:
        likeliest = some_logits(dtype=torch.float32)[0].topk(3).indices.tolist()
        tokens, _ = drawn(some_logits(dtype=torch.float32), uniform, **settings)
        assert int(tokens) in likeliest

    def test_the_ends_of_the_unit_interval_give_the_first_and_the_last_token(self) -> None:
        logits = torch.zeros(1, 50)
        assert drawn(logits, [0.0, HIGHEST])[0].tolist() == [0, 49]

    def test_logits_far_apart_do_not_overflow(self) -> None:
        logits = torch.tensor([[-1e30, 3e4, -3e4, 1e5, -torch.inf]])
        tokens, logprobs = drawn(logits, [0.0, HIGHEST])
        assert tokens.tolist() == [3, 3]
        assert logprobs.tolist() == [0.0, 0.0]

    def test_temperature_0_takes_the_likeliest_for_certain(self) -> None:
        logits = some_logits()
        tokens, logprobs = drawn(logits, [0.0, HIGHEST], temperature=0.0)
        assert tokens.tolist() == [int(logits.argmax())] * 2
        assert logprobs.tolist() == [0.0, 0.0]

    def test_temperature_0_does_not_take_a_forbidden_token(self) -> None:
        logits = some_logits()
        logits[0, END] = 60.0
        assert drawn(logits, 0.5, forbid=True, temperature=0.0)[0] != END

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_logits_that_are_no_numbers_are_an_error(self, bad: float, temperature: float) -> None:
        logits = some_logits()
        logits[0, 7] = bad
        with pytest.raises(RunError, match="logits are not finite while sampling"):
            drawn(logits, 0.5, temperature=temperature)


class TestUniforms:
    def test_each_text_has_a_stream_of_its_own(self) -> None:
        streams = [(0, 0, (1, 0)), (1, 0, (1, 0)), (0, 1, (1, 0)), (0, 0, (2, 0)), (0, 0, (1, 1)), (-1, 0, (1, 0))]
        first = [tuple(uniforms(seed, step, text, 4)) for seed, step, text in streams]
        assert len(set(first)) == len(streams)

    def test_streams_of_neighbours_do_not_overlap(self) -> None:
        """A counter runs through each: a long text must not reach its sibling's numbers."""
        one, sibling, cousin = (set(uniforms(0, 0, text, 100_000)) for text in ((5, 0), (5, 1), (6, 0)))
        assert len(one & sibling) < 5
        assert len(one & cousin) < 5

    def test_a_longer_text_begins_as_a_shorter_one(self) -> None:
        assert np.array_equal(uniforms(3, 2, (9, 1), 100)[:40], uniforms(3, 2, (9, 1), 40))

    def test_they_are_uniform_between_0_and_1(self) -> None:
        numbers = np.concatenate([uniforms(0, 0, (text, 0), 8) for text in range(4000)])
        counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
        assert ((counts - 1600) ** 2 / 1600).sum() < 60  # 19 degrees of freedom: beyond it once in 200,000 times
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0


class TestSettings:
    @pytest.mark.parametrize(
        "bad",
        [
            {"max_new_tokens": 0},
            {"min_new_tokens": -1},
            {"min_new_tokens": 5, "max_new_tokens": 4},
            {"temperature": -0.5},
            {"temperature": math.inf},
            {"temperature": math.nan},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"top_k": -1},
            {"rows": 0},
            {"stop_lag": -1},
            {"stop": "end"},
            {"stop": ("",)},
        ],
        ids=str,
    )
    def test_what_is_out_of_range_is_named(self, bad: dict[str, Any]) -> None:
        name = next(iter(bad))
        with pytest.raises(UserError, match=rf"sampling\.{name}="):
            Settings(**bad)

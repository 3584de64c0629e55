"""Rewards out of the log-probability that frozen language models give to the text.

rewards:
  - use: instant_reward.rewards.fluency:Fluency
    args: {model: smollm2-135m, clip: 8}
    every: sentence
  - use: instant_reward.rewards.fluency:LogRatio
    args: {model: trained-folder, reference: start-folder}
    weight: 0.05
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from instant_reward.rewards.language_model import exact, load
from instant_reward.rewards.token_values import TokenReward, TokenScorer
from instant_reward.types import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Fluency(TokenReward):
    """How likely a frozen language model finds the text: the log-probability of each token, in nats. At most 0.

    Every token of the model's tokenizer is paid on the characters that it covers, so that the sum over a text is the
    log-probability of the whole of it after the prompt, however it is cut into pieces (``token_values`` says how, when
    the policy has another tokenizer). ``mean`` pays each piece one number, its mean per token, instead; ``clip`` counts
    no token lower than ``-clip``; with ``see_prompt`` false the text is judged by itself. The end of a text is not
    paid. A chat prompt goes through the model's own chat template.

    Cost: one pass of the model over each token, whatever ``every`` is; the texts of one call are read together, and
    texts of one prompt share what was read of it. 64 short texts take 0.6 s (bfloat16) to 1.7 s with 135 million
    weights on one processor core. Values change by rounding with who is read together, in bfloat16 in the second digit.

    What games it: empty and short texts, since each token costs something (``mean`` with ``every: end`` has no such
    pull); the commonest phrases, and saying one thing again and again, which any model finds ever more likely. Keep a
    final score and a repetition penalty beside it. Source: the perplexity of language models; Holtzman et al., "The
    Curious Case of Neural Text Degeneration" (2020), shows what becomes of text that is driven to the likeliest.
    """

    name = "fluency"

    def __init__(
        self,
        model: str = "smollm2-135m",
        mean: bool = False,
        clip: float | None = None,
        see_prompt: bool = True,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Loads the model.

        Args:
            model: a short name, a local folder, a GGUF file or a hub id of a causal language model.
            dtype: "float32", "bfloat16" or "float64".
            device: "cpu", "cuda:1", ...; without it a GPU where there is one.

        Raises:
            UserError: the model cannot be used, or an argument is none of these.
        """
        if clip is not None and not (isinstance(clip, int | float) and clip > 0):
            raise UserError(f"fluency: clip={clip!r} must be a number above 0, or none")
        self.clip = clip
        frozen = load(model, dtype, device)
        scorer = TokenScorer(frozen, self._measure, logits=True, before=True, see_prompt=see_prompt)
        super().__init__([(scorer, 1.0)], mean)

    def _measure(self, logits: Tensor, following: Tensor) -> Tensor:
        values = logprobs(logits, following)
        return values if self.clip is None else values.clamp(min=-self.clip)


class LogRatio(TokenReward):
    """How much likelier one frozen language model finds the text than another: log-probabilities less those of the
    ``reference``, in nats. Any number.

    The implicit process reward: with a ``model`` that was trained to prefer good texts (by preferences, by labelled
    answers) from ``reference``, the log-ratio of the two rates each token without a label for any of them; with a
    teacher for ``model`` and the policy as it began for ``reference``, it is distillation by rewards. The weight of the
    source is the method's beta. Where both models have one tokenizer, each token has its own value; elsewhere the value
    of the shortest stretches at which tokens of both end. The sum over a text is the log-ratio of the whole of it;
    ``mean`` pays each piece its sum over the number of the ``model``'s tokens. The end of a text is not paid.

    Cost: one pass of both models over each token. What games it: whatever ``model`` has learned beside what was meant
    (length, phrases of its training data); text that neither model knows, where the ratio is noise. Keep a final score
    that was checked beside it.

    Source: Yuan et al., "Free Process Rewards without Process Labels" (2024); Rafailov et al., "From r to Q*: Your
    Language Model is Secretly a Q-Function" (2024).
    """

    name = "log_ratio"

    def __init__(
        self,
        model: str,
        reference: str,
        mean: bool = False,
        see_prompt: bool = True,
        dtype: str = "float32",
        device: str | None = None,
    ) -> None:
        """Loads both models; arguments as for ``Fluency``. UserError where one cannot be used."""
        pair = [(load(model, dtype, device), 1.0), (load(reference, dtype, device), -1.0)]
        scorers = [
            (TokenScorer(frozen, logprobs, logits=True, before=True, see_prompt=see_prompt), sign)
            for frozen, sign in pair
        ]
        super().__init__(scorers, mean)


def logprobs(logits: Tensor, following: Tensor) -> Tensor:
    """The log-probability ``[n]`` of the tokens that follow, out of logits ``[n, V]``; in float32 at least."""
    numbers = exact(logits)
    chosen: Tensor = numbers.gather(-1, following[:, None])[:, 0]
    return chosen - numbers.logsumexp(-1)

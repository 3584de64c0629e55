"""An encoder-decoder as a policy: what it samples is what it learns from, each source is read once, runs resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, M2M100Config, M2M100ForConditionalGeneration

import instant_reward as ir
from instant_reward.batch import Batch, collate
from instant_reward.cli import main
from instant_reward.policies.encoder_decoder import EncoderDecoder
from instant_reward.policies.kinds import load_policy
from instant_reward.policies.seq2seq import Seq2SeqPolicy
from instant_reward.policies.teacher import shown_to_teacher
from instant_reward.sampling import columns
from instant_reward.sampling.seq2seq import Seq2SeqDecoder
from instant_reward.types import Rollout, UserError
from tiny import tiny_folder
from tiny_seq2seq import (
    IDS,
    KINDS,
    SHAPE,
    STEP_ID,
    TOKENIZER,
    letters_tokenizer,
    seq2seq_folder,
    tiny_model,
    tiny_seq2seq,
)

EXACT = {"rtol": 0.0, "atol": 1e-10}
SOURCES = ["abc de", "a", "edcba ab", "b"]


def sampled(policy: Seq2SeqPolicy, **settings: Any) -> list[Rollout]:
    """Groups of six from sources of one to eight tokens, more texts than rows: texts take each other's place."""
    options: dict[str, Any] = {"per_prompt": 6, "max_new_tokens": 9, "temperature": 1.5, "rows": 5, "seed": 2}
    return policy.sample(SOURCES, **(options | settings))


def batch_of(policy: Seq2SeqPolicy, rollouts: Sequence[Rollout]) -> Batch:
    dtype = torch.float64 if policy.compute == torch.float64 else torch.float32
    return collate(rollouts, pad_id=policy.pad_id, dtype=dtype)


def gap(policy: Seq2SeqPolicy, batch: Batch) -> float:
    """The largest distance between the trainer's and the sampler's log-probabilities."""
    with torch.no_grad():
        return float((policy(batch).logprobs - batch.old_logprobs).abs().max())


def by_definition(policy: Seq2SeqPolicy, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """The log-probabilities ``[L]`` of one text by the model's own forward pass, without padding."""
    ids = torch.tensor([rollout.token_ids])
    out = policy.model(input_ids=torch.tensor([rollout.context]), decoder_input_ids=ids[:, :-1], use_cache=False)
    logits = out.logits[0]
    if policy.model.config.model_type == "marian":
        logits = logits.index_fill(1, torch.tensor([IDS["pad_token_id"]]), -torch.inf)
    picked = (logits / temperature).log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return torch.where(torch.tensor(rollout.mask), torch.cat([torch.zeros_like(picked[:1]), picked]), 0.0)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestSampling:
    @pytest.mark.parametrize("settings", [{}, {"temperature": 1.7, "min_new_tokens": 3}], ids=["hot", "forbidden end"])
    def test_its_log_probabilities_are_the_trainers(self, kind: str, settings: dict[str, Any]) -> None:
        policy = tiny_seq2seq(kind)
        rollouts = sampled(policy, **settings)
        assert len({len(rollout.token_ids) for rollout in rollouts}) > 2, "texts of different lengths were meant"
        assert gap(policy, batch_of(policy, rollouts)) <= 1e-10

    def test_what_is_decoded_beside_a_text_changes_nothing(self, kind: str) -> None:
        policy = tiny_seq2seq(kind)
        alone, beside = sampled(policy, rows=1), sampled(policy, rows=7)
        for one, other in zip(alone, beside, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-10)

    def test_columns_that_nobody_looks_at_are_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Forty texts go through three rows in a cache of twice a text's width, and stay exact."""
        shifts = []
        advance = columns.ColumnCache.advance

        def watched(cache: columns.ColumnCache, device: torch.device) -> Any:
            before = cache._next
            found = advance(cache, device)
            shifts.append(cache._next <= before)
            return found

        monkeypatch.setattr(columns.ColumnCache, "advance", watched)
        policy = tiny_seq2seq("t5")
        assert gap(policy, batch_of(policy, sampled(policy, per_prompt=10, rows=3))) <= 1e-10
        assert sum(shifts) >= 3

    def test_weights_are_those_of_the_last_load(self) -> None:
        policy = tiny_seq2seq("bart", torch.bfloat16)
        engine = policy.engine(ir_settings(), 0)
        prompts = policy.prompts([{"prompt": "abc"}], "prompt", 4)
        before = [one.token_ids for one in engine.stream(prompts, 4)]
        with torch.no_grad():
            policy.model.get_output_embeddings().weight.neg_()
        assert [one.token_ids for one in engine.stream(prompts, 4)] == before
        engine.load(policy, 1)
        assert [one.token_ids for one in engine.stream(prompts, 4)] != before

    def test_a_banned_token_is_never_written(self) -> None:
        policy = tiny_seq2seq("marian")
        with torch.no_grad():
            policy.model.final_logits_bias[0, IDS["pad_token_id"]] = 50.0
        rollouts = sampled(policy)
        assert not any(IDS["pad_token_id"] in one.token_ids[1:] for one in rollouts)
        assert gap(policy, batch_of(policy, rollouts)) <= 1e-10

    def test_a_forced_token_begins_every_text(self) -> None:
        rollouts = sampled(tiny_seq2seq("bart"))
        assert all(one.token_ids[:2] == [IDS["eos_token_id"], STEP_ID] for one in rollouts)
        assert all(one.mask[:3] == [False, False, True] for one in rollouts)

    def test_live_rewards_stop_texts(self) -> None:
        @ir.reward(every="token")
        def no_b(view: ir.View) -> Any:
            return ir.stop(-1.0) if "b" in view.piece else 0.0

        policy = tiny_seq2seq("t5")
        rollouts = sampled(policy, rewards=[no_b], max_new_tokens=20)
        stopped = [one for one in rollouts if one.stop == "stopped"]
        assert stopped
        assert all(one.text.count("b") == 1 and one.text.endswith("b") for one in stopped)
        assert gap(policy, batch_of(policy, rollouts)) <= 1e-10

    def test_rewards_see_the_source(self) -> None:
        seen = []

        @ir.reward(every="end")
        def look(view: ir.View) -> float:
            seen.append(view.prompt.text)
            return 0.0

        sampled(tiny_seq2seq("t5"), rewards=[look])
        assert sorted(set(seen)) == sorted(SOURCES)


def ir_settings() -> Any:
    from instant_reward.sampling.draw import Settings

    return Settings(max_new_tokens=8)


class TestLogProbabilities:
    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_they_and_their_gradients_are_those_of_the_models_own_pass(self, kind: str, temperature: float) -> None:
        policy = tiny_seq2seq(kind)
        rollouts = sampled(policy)
        batch = batch_of(policy, rollouts)
        weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        ours = policy.logprobs(
            batch.token_ids, batch.mask, batch.length, temperature, contexts=[one.context or [] for one in rollouts]
        )
        theirs = [by_definition(policy, one, temperature) for one in rollouts]
        for row, expected in enumerate(theirs):
            assert torch.allclose(ours[row, : len(expected)], expected, **EXACT)
            assert not ours[row, len(expected) :].any()
        total = sum((weights[row, : len(one)] * one).sum() for row, one in enumerate(theirs))
        parameters = [one for one in policy.model.parameters() if one.requires_grad]
        found = torch.autograd.grad((weights * ours).sum(), parameters, allow_unused=True)
        expected_gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for one, other in zip(found, expected_gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)

    def test_padding_changes_nothing(self, kind: str) -> None:
        """Whatever fills the rows, and however long the other sources are."""
        policy = tiny_seq2seq(kind)
        rollouts = sampled(policy)
        whole = policy(batch_of(policy, rollouts)).logprobs
        for row, rollout in enumerate(rollouts[::4]):
            alone = policy(batch_of(policy, [rollout])).logprobs[0]
            assert torch.allclose(whole[4 * row, : len(alone)], alone, **EXACT)
        other = collate(rollouts, pad_id=1, dtype=torch.float64)
        assert torch.allclose(policy(other).logprobs, whole, **EXACT)

    def test_parts_and_order_change_nothing(self) -> None:
        policy = tiny_seq2seq("berts")
        batch = batch_of(policy, sampled(policy))
        whole = policy(batch).logprobs
        for rows in batch.shares(40):
            part = policy(batch.select(rows)).logprobs
            assert torch.allclose(part, whole[rows, : part.shape[1]], **EXACT)

    def test_the_encoder_runs_once_for_each_source(self) -> None:
        policy = tiny_seq2seq("bart")
        read: list[int] = []
        handle = policy.model.get_encoder().register_forward_hook(
            lambda _, __, out: read.append(len(out.last_hidden_state))
        )
        rollouts = sampled(policy, rows=64)
        assert sum(read) == len(SOURCES), "sampling"
        read.clear()
        policy(batch_of(policy, rollouts))
        assert read == [len(SOURCES)], "training"
        handle.remove()

    def test_bfloat16_computes_near_float32_over_float32_weights(self, kind: str) -> None:
        policy, exact = tiny_seq2seq(kind, torch.bfloat16), tiny_seq2seq(kind, torch.float32)
        rollouts = sampled(policy)
        batch = batch_of(policy, rollouts)
        assert next(policy.model.parameters()).dtype == torch.float32
        reference = exact(batch).logprobs.detach()
        assert 0 < float((policy(batch).logprobs - reference).abs().mean().detach()) < 0.05
        assert float((batch.old_logprobs - reference).abs().mean()) < 0.05
        policy(batch).logprobs.sum().backward()
        weight = policy.model.get_output_embeddings().weight
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32

    def test_without_sources_nothing_is_said(self) -> None:
        policy = tiny_seq2seq("t5")
        with pytest.raises(UserError, match="contexts="):
            policy.logprobs([[0, 1]], [[0, 1]])
        with pytest.raises(UserError, match="2 entries for 1 rows"):
            policy.logprobs([[0, 1]], [[0, 1]], contexts=[[1], [2]])


class TestPrompts:
    def test_a_row_becomes_a_source_and_a_start(self) -> None:
        policy = tiny_seq2seq("bart")
        (prompt,) = policy.prompts([{"prompt": "ab c", "target": "x"}], "prompt", 5)
        assert prompt.context == TOKENIZER("ab c")["input_ids"]
        assert prompt.token_ids == [IDS["eos_token_id"], STEP_ID]
        assert (prompt.text, prompt.info) == ("ab c", {"target": "x"})
        assert policy.actions_of("ab", prompt) == [0, 1, IDS["eos_token_id"]]

    def test_from_nothing_it_writes_nothing(self) -> None:
        with pytest.raises(UserError, match="name the column"):
            tiny_seq2seq().unprompted([{}])

    def test_what_does_not_fit_is_refused(self) -> None:
        policy = tiny_seq2seq("berts")  # its decoder reads 64 tokens
        with pytest.raises(UserError, match=r"prompt 1 has a source of 65 tokens, and the encoder may read 64"):
            policy.prompts([{"prompt": "a"}, {"prompt": "a" * 65}], "prompt", 5)
        with pytest.raises(UserError, match="may read 7"):
            policy.prompts([{"prompt": "a" * 8}], "prompt", 5, most=7)
        with pytest.raises(UserError, match=r"max_new_tokens: .* 65 tokens, its start included, and reads 64"):
            policy.prompts([{"prompt": "a"}], "prompt", 64)
        assert tiny_seq2seq("t5").context == 2**31

    def test_a_teacher_reads_another_source(self) -> None:
        policy = tiny_seq2seq("t5")
        rollouts = sampled(policy)
        shown = shown_to_teacher(rollouts, "b{prompt}", TOKENIZER, policy.pad_id, policy.context)
        batch = batch_of(policy, rollouts)
        assert shown.contexts == [TOKENIZER(f"b{one.prompt.text}")["input_ids"] for one in rollouts]
        assert torch.equal(shown.token_ids, batch.token_ids)
        other = [
            replace(one, prompt=replace(one.prompt, context=ids))
            for one, ids in zip(rollouts, shown.contexts, strict=True)
        ]
        head = policy.head(policy.model, batch, shown)
        expected = policy(batch_of(policy, other)).logprobs
        assert torch.allclose(policy.token_logprobs(head, batch).logprobs, expected, **EXACT)


class TestRefusals:
    def test_no_start_token(self) -> None:
        model = tiny_model("t5")
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
        with pytest.raises(UserError, match="decoder_start_token_id"):
            tiny_seq2seq(model=model)

    def test_logits_that_are_made_in_another_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model("bart")
        forward = model.lm_head.forward
        monkeypatch.setattr(model.lm_head, "forward", lambda x: forward(2 * x))
        with pytest.raises(UserError, match="makes its logits in a way that is not known"):
            tiny_seq2seq(model=model)

    def test_positions_that_hang_on_what_is_decoded_beside(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from contextlib import nullcontext

        monkeypatch.setattr(EncoderDecoder, "at", lambda *_: nullcontext({}))
        tiny_seq2seq("t5")  # positions that are relative need nothing
        for kind in ("bart", "marian", "berts"):
            with pytest.raises(UserError, match="cannot be decoded side by side"):
                tiny_seq2seq(kind)

    def test_positions_that_are_counted_from_the_tokens(self) -> None:
        """M2M100's (NLLB's) are no table of weights, and count the tokens that are no padding."""
        config = M2M100Config(**IDS, **SHAPE, decoder_start_token_id=IDS["eos_token_id"])
        torch.manual_seed(0)
        with pytest.raises(UserError, match="places its tokens"):
            Seq2SeqPolicy(M2M100ForConditionalGeneration(config).eval(), TOKENIZER, torch.float32)

    def test_a_vocabulary_that_does_not_match(self) -> None:
        model = tiny_model("bart")
        model.resize_token_embeddings(len(TOKENIZER) - 1)
        with pytest.raises(UserError, match="do not belong together"):
            tiny_seq2seq("bart", model=model)

    def test_another_attention(self) -> None:
        model = tiny_model("bart")
        model.set_attn_implementation("eager")
        with pytest.raises(UserError, match="'eager'"):
            tiny_seq2seq(model=model)

    def test_beside_it_stands_only_its_own_kind(self, tmp_path: Path) -> None:
        policy = tiny_seq2seq("t5", torch.float32)
        with pytest.raises(UserError, match="cannot be loaded"):
            policy.load_beside(str(tiny_folder(tmp_path / "causal")), "algorithm.teacher.model")
        folder = seq2seq_folder(tmp_path / "other", "bart")
        with pytest.raises(UserError, match="begins its texts with"):
            policy.load_beside(str(folder), "algorithm.teacher.model")
        letters_tokenizer("abcdx").save_pretrained(folder)
        with pytest.raises(UserError, match="another tokenizer"):
            policy.load_beside(str(folder), "algorithm.teacher.model")


@ir.reward(every="token")
def likes_source(view: ir.View) -> float:
    """The source's first letter is worth one."""
    return float(view.piece == view.prompt.text[0])


def trained(
    folder: Path, out: Path, algorithm: str = "rloo", rewards: Any = None, resume: bool = False, **changes: Any
) -> ir.Run:
    """A short run; ``changes`` by dotted paths, a double underscore for each dot."""
    values: dict[str, Any] = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": [{"prompt": text, "target": text[:2]} for text in SOURCES]},
        "algorithm": {"name": algorithm},
        "sampling": {"max_new_tokens": 5},
        "train": {"steps": 3, "prompts_per_step": 3, "group_size": 3, "learning_rate": 3e-3},
        "out": str(out),
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return ir.train(ir.Config.build(values), rewards=rewards or [likes_source], resume=resume)


class TestTraining:
    @pytest.mark.parametrize(
        ("algorithm", "changes"),
        [
            ("rloo", {"algorithm__kl": 0.1}),
            ("ppo", {"algorithm__kl": 0.1}),
            ("a2c", {"algorithm__critic__model": "head"}),
            ("qac", {}),
            ("vtrace", {"train__replay": {"groups": 1, "staleness": 2}}),
            ("distill", {"algorithm__teacher__sees": "a{prompt}"}),
        ],
    )
    def test_presets_with_critics_references_and_teachers(
        self, kind: str, algorithm: str, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        folder = seq2seq_folder(tmp_path / "model", kind)
        run = trained(folder, tmp_path / "run", algorithm=algorithm, train__save_every=1, **changes)
        assert len(run.metrics) == 3
        if algorithm != "qac" and "train__replay" not in changes:  # which compare no log-probabilities; older texts
            assert all(abs(row["sampler_gap"]) < 1e-4 for row in run.metrics)
        started = load_policy(str(folder)).model.state_dict()
        moved = [name for name, now in run.policy.model.state_dict().items() if not torch.equal(now, started[name])]
        assert any("encoder" in name for name in moved)
        assert any("decoder" in name for name in moved)
        assert any(
            name.endswith(("EncDecAttention.v.weight", "encoder_attn.v_proj.weight", "self.value.weight"))
            for name in moved
        )

    @pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
    def test_a_resumed_run_is_the_same_run(self, kind: str, algorithm: str, tmp_path: Path) -> None:
        folder = seq2seq_folder(tmp_path / "model", kind)
        options: dict[str, Any] = {"algorithm": algorithm, "algorithm__kl": 0.05, "train__save_every": 2}
        whole = trained(folder, tmp_path / "whole", train__steps=4, **options)
        trained(folder, tmp_path / "cut", train__steps=2, **options)
        resumed = trained(folder, tmp_path / "cut", train__steps=4, resume=True, **options)
        for name, weight in whole.policy.model.state_dict().items():
            assert torch.equal(weight, resumed.policy.model.state_dict()[name]), name

    def test_given_texts_are_learned_as_targets(self, tmp_path: Path) -> None:
        folder = seq2seq_folder(tmp_path / "model", "t5")

        def odds(policy: Any) -> float:
            rows = [{"prompt": text, "target": text[:2]} for text in SOURCES]
            found = 0.0
            for prompt in policy.prompts(rows, "prompt", 5):
                ids = [*prompt.token_ids, *policy.actions_of(prompt.info["target"], prompt)]
                found += float(policy.logprobs([ids], [[0] + [1] * (len(ids) - 1)], contexts=[prompt.context]).sum())
            return found

        changes = {"data__completion": "target", "train__steps": 40, "train__group_size": 1, "rewards": [always]}
        run = trained(folder, tmp_path / "run", algorithm="raft", **changes)
        assert odds(run.policy) > odds(load_policy(str(folder))) + 5.0

    @pytest.mark.parametrize("kind", ["t5", "bart", "marian", "berts"])
    def test_it_learns_what_its_source_asks_for(self, kind: str, tmp_path: Path) -> None:
        """Of five tokens the first letter of the source; one letter for all sources would earn 1.25."""
        folder = seq2seq_folder(tmp_path / "model", kind)
        size = {"steps": 60, "prompts_per_step": 4, "group_size": 8}
        changes = {f"train__{name}": value for name, value in size.items()}
        run = trained(folder, tmp_path / "run", data__prompts=["abc de", "cab", "edcba ab", "b"], **changes)
        assert sum(row["reward"] for row in run.metrics[-5:]) / 5 > 3.5

    def test_saved_it_is_what_transformers_loads(self, kind: str, tmp_path: Path) -> None:
        folder = seq2seq_folder(tmp_path / "model", kind)
        run = trained(folder, tmp_path / "run")
        saved = run.policy.save(tmp_path / "saved")
        again = load_policy(str(saved))
        assert isinstance(again, Seq2SeqPolicy)
        batch = batch_of(again, sampled(again))
        assert torch.equal(again(batch).logprobs, run.policy(batch).logprobs)
        ids, start = torch.tensor([[0, 1, 2]]), torch.tensor([again.starts])
        theirs = AutoModelForSeq2SeqLM.from_pretrained(saved).eval()(input_ids=ids, decoder_input_ids=start).logits
        assert torch.equal(theirs, run.policy.model(input_ids=ids, decoder_input_ids=start).logits)

    def test_an_adapter_learns_alone(self, kind: str, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        folder = seq2seq_folder(tmp_path / "model", kind)
        run = trained(
            folder, tmp_path / "run", algorithm="ppo", algorithm__kl=0.1, train__save_every=1,
            model__lora={"rank": 4}, train__learning_rate=1e-2,
        )  # fmt: skip
        names = [name for name, one in run.policy.model.named_parameters() if one.requires_grad]
        assert names
        assert all("lora" in name for name in names)
        assert all(abs(row["sampler_gap"]) < 1e-4 for row in run.metrics)
        merged = load_policy(str(run.policy.save(tmp_path / "merged")))
        batch = batch_of(merged, sampled(merged))
        assert torch.allclose(merged(batch).logprobs, run.policy(batch).logprobs, atol=1e-4)
        assert not torch.allclose(merged(batch).logprobs, load_policy(str(folder))(batch).logprobs, atol=1e-3)

    def test_a_critic_of_next_tokens_guides_the_decoding(self, tmp_path: Path) -> None:
        folder = seq2seq_folder(tmp_path / "model", "t5")
        run = trained(
            folder, tmp_path / "run", algorithm="ilql", train__group_size=1, data__completion="target",
            algorithm__critic__model="head",
        )  # fmt: skip
        assert len(run.policy.sample(["abc"], per_prompt=2, guide=2.0, max_new_tokens=4)) == 2

    def test_the_commands_take_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = seq2seq_folder(tmp_path / "model", "t5")
        assert main(["sample", str(folder), "abc", "--max-new-tokens", "4"]) in (0, None)
        assert capsys.readouterr().out


@ir.reward(every="end")
def always(view: ir.View) -> float:
    """One for every text."""
    return 1.0


def test_a_source_counts_in_the_size_of_a_part() -> None:
    policy = tiny_seq2seq("t5")
    rollouts = sampled(policy, per_prompt=1)
    batch = batch_of(policy, rollouts)
    longer = replace(batch, contexts=[[1] * 100 for _ in rollouts])
    assert len(list(batch.shares(100))) < len(list(longer.shares(100)))


def test_the_decoder_puts_no_hook_on_the_model_for_good() -> None:
    policy = tiny_seq2seq("bart")
    sampled(policy)
    table = Seq2SeqDecoder(policy.model, torch.float64).parts.decoder.embed_positions
    assert not table._forward_hooks

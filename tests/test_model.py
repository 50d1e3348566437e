"""Built models: seeds, streaming, generation, checkpoints."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from flops import counted_flops
from safetensors.torch import save_file
from tolerance import assert_close
from torch import Tensor

import zoo
from zoo.blocks.model import Spec
from zoo.device import resolve_device
from zoo.errors import ZooError
from zoo.generate import choose
from zoo.hardware.memory import peak_bytes
from zoo.model import Model, build, load_model

VOCAB = 13
ATTENTION = {"mixer": {"type": "attention", "heads": 2, "window": 5}, "channel": "glu"}
MAMBA = {"mixer": {"type": "mamba2", "head_dim": 16, "state_dim": 4}, "channel": "mlp"}
LINEAR = {"mixer": {"type": "linear_attention", "heads": 2, "decay": "data"}}


def language_model(**fields: Any) -> Spec:
    usual = {
        "width": 16,
        "context": 16,
        "init_std": 0.4,
        "stem": {"type": "token", "vocab": VOCAB},
        "body": {"layers": [ATTENTION, MAMBA, LINEAR]},
        "head": "language_model",
    }
    return Spec(**{**usual, **fields})


def image_model(**fields: Any) -> Spec:
    usual = {
        "width": 16,
        "stem": {"type": "patch", "image": [8, 12], "size": 2, "class_token": True},
        "body": {"layers": [{"mixer": {"type": "attention", "heads": 2}, "channel": "mlp"}] * 2},
        "head": {"type": "classifier", "classes": 5},
    }
    return Spec(**{**usual, **fields})


def pyramid() -> Spec:
    body = {
        "type": "stages",
        "stages": [
            {"width": 16, "layers": [{"mixer": "pooling", "channel": "mlp"}] * 2},
            {
                "width": 32,
                "reduce": "merge",
                "layers": [{"mixer": {"type": "attention", "heads": 4}, "channel": "glu"}],
            },
            {"width": 32, "layers": [{"mixer": "token_mlp", "channel": "glu"}]},
        ],
    }
    stem = {"type": "patch", "image": [16, 8], "size": 2}
    return image_model(stem=stem, body=body, head={"type": "regression", "outputs": 3})


def words(batch: int = 2, tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def weights(model: Model) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def model() -> Model:
    return build(language_model(), dtype=torch.float64).eval()


class TestBuilding:
    def test_specs_mappings_and_files_give_the_same_model(self, tmp_path: Path) -> None:
        spec = language_model()
        file = tmp_path / "small.yaml"
        file.write_text(zoo.dump(spec), encoding="utf-8")
        mapping = {
            "width": 16,
            "context": 16,
            "init_std": 0.4,
            "stem": {"type": "token", "vocab": VOCAB},
            "body": {"layers": [ATTENTION, MAMBA, LINEAR]},
            "head": "language_model",
        }
        first, *others = [build(given) for given in (spec, mapping, file, str(file))]
        for other in others:
            assert weights(other).keys() == weights(first).keys()
            assert torch.equal(other(words()).logits, first(words()).logits)

    def test_a_wrong_spec_is_refused(self) -> None:
        with pytest.raises(ZooError, match="heads 3 does not divide width 16"):
            build(language_model(body={"layers": [{"mixer": {"type": "attention", "heads": 3}}]}))
        with pytest.raises(ZooError, match="no spec is called 'nothing-like-it'"):
            build("nothing-like-it")

    def test_the_seed_decides_everything(self) -> None:
        first, again, other = build(language_model()), build(language_model(), seed=0), build(language_model(), seed=1)
        for name, tensor in weights(first).items():
            assert torch.equal(tensor, weights(again)[name]), name
        assert not torch.equal(first(words()).logits, other(words()).logits)

    def test_a_tensor_does_not_depend_on_what_else_there_is(self) -> None:
        deep = build(language_model(body={"layers": [ATTENTION, MAMBA, LINEAR, LINEAR]}, init_std=0.4))
        shallow = weights(build(language_model()))
        for name in ("stem.weight", "body.layers.0.mixer.query.weight", "body.layers.1.mixer.A_log"):
            assert torch.equal(weights(deep)[name], shallow[name]), name

    def test_the_global_generator_is_left_alone(self) -> None:
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)
        build(language_model())
        assert torch.equal(torch.rand(3), expected)

    def test_half_precision_is_the_rounded_model(self) -> None:
        half, full = weights(build(language_model(), dtype=torch.bfloat16)), weights(build(language_model()))
        for name, tensor in half.items():
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, full[name].bfloat16()), name

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_the_device_does_not_change_the_weights(self) -> None:
        there = weights(build(language_model(), device="cuda"))
        for name, tensor in weights(build(language_model())).items():
            assert there[name].is_cuda
            assert torch.equal(there[name].cpu(), tensor), name

    def test_gpt3_on_meta(self) -> None:
        width, depth, vocab, context = 12288, 96, 50257, 2048
        layer = {
            "mixer": {"type": "attention", "heads": 96, "bias": True, "out_bias": True},
            "channel": {"type": "mlp", "bias": True},
        }
        spec = language_model(
            width=width,
            context=context,
            norm="layernorm",
            activation="gelu",
            position="learned",
            stem={"type": "token", "vocab": vocab},
            body={"layers": [layer] * depth},
            head="language_model",
        )
        built = build(spec, device="meta")
        assert all(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))
        attention, network, norms = 4 * width**2 + 4 * width, 8 * width**2 + 5 * width, 4 * width
        expected = (vocab + context) * width + depth * (attention + network + norms) + 2 * width
        assert sum(parameter.numel() for parameter in built.parameters()) == expected
        assert zoo.metrics(spec)["params"] == expected
        assert 174e9 < expected < 175.5e9
        assert built(torch.zeros(1, 4, dtype=torch.long, device="meta")).logits.shape == (1, 4, vocab)

    def test_what_writes_to_the_stream_starts_smaller(self) -> None:
        layers = [{"mixer": {"type": "attention", "heads": 4}, "channel": "mlp"}] * 8
        built = weights(build(language_model(width=128, init_std=0.02, body={"layers": layers})))
        stds = {name: tensor.std().item() for name, tensor in built.items() if name.startswith("body.layers.5.")}
        for name in ("mixer.query", "mixer.key", "mixer.value", "channel.up"):
            assert stds[f"body.layers.5.{name}.weight"] == pytest.approx(0.02, rel=0.02)
        for name in ("mixer.out", "channel.down"):
            assert stds[f"body.layers.5.{name}.weight"] == pytest.approx(0.02 / 16**0.5, rel=0.02)
        assert built["stem.weight"].std().item() == pytest.approx(0.02, rel=0.05)

    def test_vectors_and_tables_do_not_decay(self, model: Model) -> None:
        assert all(weights(model)[name].dim() >= 2 for name in weights(model).keys() - model.no_decay)
        assert {"stem.weight", "body.final_norm.weight", "body.layers.1.mixer.A_log"} <= model.no_decay
        assert "body.layers.0.mixer.query.weight" not in model.no_decay

    @pytest.mark.parametrize("spec", [image_model(), pyramid(), language_model()], ids=["vit", "pyramid", "hybrid"])
    def test_counts_are_those_of_the_built_model(self, spec: Spec) -> None:
        built = build(spec).eval()
        figures = zoo.metrics(spec)
        assert figures["params"] == sum(parameter.numel() for parameter in built.parameters())
        inputs = built.example_inputs(1, spec.context)
        with torch.no_grad():
            assert figures["flops"] == pytest.approx(counted_flops(built, inputs), rel=0.01)

    def test_image_models_answer(self) -> None:
        images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
        model = build(image_model()).eval()
        assert model(images).logits.shape == (2, 5)
        assert model.head_kind == "classifier"
        assert [tuple(hidden.shape) for hidden in model(images, hidden_states=True).hidden or ()] == [(2, 25, 16)] * 2
        tall = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))
        layers = build(pyramid()).eval()(tall, hidden_states=True)
        assert layers.logits.shape == (2, 3)
        assert [hidden.shape[1:] for hidden in layers.hidden or ()] == [(32, 16), (32, 16), (8, 32), (8, 32)]


class TestForward:
    def test_hidden_states_are_those_that_the_layers_give(self, model: Model) -> None:
        output = model(words(), hidden_states=True)
        assert output.hidden is not None and len(output.hidden) == 3
        last = model.body.final_norm(output.hidden[-1])
        assert torch.equal(last @ model.stem.weight.T, output.logits)
        assert model(words()).hidden is None

    def test_checkpointing_recomputes_layers_and_changes_nothing(self) -> None:
        def gradients(enabled: bool) -> tuple[int, dict[str, Tensor]]:
            built = build(language_model(), dtype=torch.float64).set_checkpointing(enabled).train()
            calls: list[int] = []
            built.body.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
            built(words()).logits.square().sum().backward()
            return len(calls), {name: parameter.grad for name, parameter in built.named_parameters()}  # type: ignore[misc]

        plain_calls, plain = gradients(False)
        calls, found = gradients(True)
        assert (plain_calls, calls) == (1, 2)
        for name, gradient in plain.items():
            assert torch.equal(found[name], gradient), name

    def test_what_checkpointing_recomputes_is_not_kept_by_a_loss(self) -> None:
        def peak(balance: float) -> int:
            moe = {"type": "moe", "experts": 2, "hidden": 8, "balance": balance}
            body = {"layers": [{"mixer": {"type": "attention", "heads": 2}, "channel": moe}] * 6}
            built = build(language_model(body=body, context=256)).set_checkpointing().train()
            inputs = torch.zeros(2, 256, dtype=torch.long)

            def step() -> None:
                output = built(inputs)
                (output.logits.sum() + sum(output.losses.values())).backward()

            return peak_bytes(step, resolve_device("cpu", 1))

        assert peak(0.1) < 1.1 * peak(0.0)

    def test_checkpointing_draws_the_same_dropout_again(self) -> None:
        layer = {"mixer": {"type": "attention", "heads": 2}, "residual": {"type": "pre", "dropout": 0.5}}

        def gradient(enabled: bool) -> Tensor:
            built = build(language_model(body={"layers": [layer] * 2})).set_checkpointing(enabled).train()
            torch.manual_seed(1)
            built(words()).logits.square().sum().backward()
            grad = built.stem.weight.grad
            assert grad is not None
            return grad

        assert torch.equal(gradient(True), gradient(False))

    def test_auxiliary_losses_come_with_the_output_in_training(self) -> None:
        moe = {"channel": {"type": "moe", "experts": 4, "hidden": 8, "balance": 0.5, "z_loss": 0.1}}
        built = build(language_model(body={"layers": [moe, moe]}))
        losses = built.train()(words()).losses
        assert set(losses) == {"balance", "router_z"}
        assert all(loss.dim() == 0 and loss.requires_grad for loss in losses.values())
        assert losses["balance"] >= 0.5
        assert not built.eval()(words()).losses


class TestStreaming:
    @pytest.mark.parametrize("chunk", [1, 3, 7, 50, None])
    def test_prefill_in_chunks_equals_the_whole(self, model: Model, chunk: int | None) -> None:
        whole = model(words()).logits
        with torch.no_grad():
            output = model.prefill(words(), chunk=chunk)
        assert output.state is not None
        assert (output.state.past, output.state.capacity) == (12, 16)
        assert_close(output.logits[:, -1], whole[:, -1])
        with torch.no_grad():
            step = model.step(torch.tensor([1, 2]), output.state)
        longer = model(torch.cat((words(), torch.tensor([[1], [2]])), dim=1)).logits
        assert_close(step.logits[:, 0], longer[:, -1])

    def test_a_state_says_when_it_is_full(self, model: Model) -> None:
        state = model.init_state(2, capacity=4)
        with pytest.raises(
            ZooError, match="room for 4 tokens: 0 are taken and 12 more came; ask `init_state` for more"
        ):
            model(words(), state=state)
        full = model.prefill(words()[:, :4], state).state
        assert full is not None
        with pytest.raises(ZooError, match="room for 4 tokens: 4 are taken and 1 more came"):
            model.step(words()[:, 0], full)

    def test_a_state_and_packed_sequences_exclude_each_other(self, model: Model) -> None:
        with pytest.raises(ZooError, match="exclude each other"):
            model(words(), state=model.init_state(2), segments=torch.zeros_like(words()))

    @pytest.mark.parametrize(
        "spec", [image_model(), language_model(head={"type": "classifier", "classes": 2})], ids=["images", "text"]
    )
    def test_models_that_see_later_tokens_refuse_a_state(self, spec: Spec) -> None:
        built = build(spec).eval()
        with pytest.raises(ZooError, match="only a causal model of token sequences can go on from a state"):
            built(built.example_inputs(1, 4), state=built.init_state(1, 64))

    def test_components_that_promise_no_state_get_none(self) -> None:
        body = {"layers": [{"mixer": "token_mlp"}]}
        built = build(language_model(body=body, head={"type": "classifier", "classes": 2}))
        with pytest.raises(ZooError, match="token_mlp cannot keep packed sequences apart"):
            built(words(2, 16), segments=torch.zeros(2, 16, dtype=torch.long))

    def test_learned_positions_end_with_the_context(self) -> None:
        built = build(language_model(position="learned")).eval()
        assert built.generate(words(1, 4), 12).shape == (1, 16)
        with pytest.raises(ZooError, match="learned positions end with the context of 16 tokens; got 17"):
            built(words(1, 17))
        with pytest.raises(ZooError, match="context of 16 tokens; got 17"):
            built.generate(words(1, 4), 14)

    def test_cases_for_timing_repeat_one_call(self, model: Model) -> None:
        with torch.no_grad():
            decode: Any = model.decode_case(2, 5)
            assert torch.equal(decode().logits, decode().logits)
            forward: Any = model.forward_case(2, 7)
            assert forward().logits.shape == (2, 7, VOCAB)


class TestGeneration:
    def rollout(self, model: Model, prompt: Tensor, tokens: int) -> Tensor:
        for _ in range(tokens):
            prompt = torch.cat((prompt, model(prompt).logits[:, -1:].argmax(dim=-1)), dim=1)
        return prompt

    def test_greedy_is_the_best_token_each_time(self, model: Model) -> None:
        expected = self.rollout(model, words(3, 4), 10)
        for options in ({}, {"chunk": 1}, {"chunk": 3}, {"chunk": None}):
            assert torch.equal(model.generate(words(3, 4), 10, temperature=0, **options), expected)
        assert torch.equal(model.generate(words(3, 4), 10, top_k=1), expected)
        assert torch.equal(model.generate(words(3, 4), 10, top_p=1e-9), expected)

    def test_nothing_asked_nothing_done(self, model: Model) -> None:
        assert torch.equal(model.generate(words(), 0), words())

    def test_the_generator_decides(self, model: Model) -> None:
        def drawn(seed: int) -> Tensor:
            return model.generate(words(), 12, generator=torch.Generator().manual_seed(seed))

        assert torch.equal(drawn(0), drawn(0))
        assert not torch.equal(drawn(0), drawn(1))
        assert torch.equal(drawn(0)[:, :12], words())

    def test_sequences_end_by_themselves(self, model: Model) -> None:
        free = model.generate(words(3, 4), 10, temperature=0)
        stop = int(free[0, 6])
        seen: list[Tensor] = []
        found = model.generate(words(3, 4), 10, temperature=0, stop=[stop], pad=VOCAB + 1, on_token=seen.append)
        for row, whole in zip(found.tolist(), free.tolist(), strict=True):
            ends = [place for place in range(4, 14) if whole[place] == stop]
            end = ends[0] + 1 if ends else len(row)
            assert row[: min(end, len(row))] == whole[: min(end, len(row))]
            assert set(row[end:]) <= {VOCAB + 1}
        assert found[0, 7] == VOCAB + 1
        assert torch.equal(torch.stack(seen, dim=1), found[:, 4:])

    def test_it_ends_when_all_have_ended(self, model: Model) -> None:
        found = model.generate(words(3, 4), 10, stop=range(VOCAB))
        assert found.shape == (3, 5)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"temperature": -0.1}, "temperature must be at least 0; got -0.1"),
            ({"temperature": float("nan")}, "temperature must be at least 0; got nan"),
            ({"top_k": 0}, "top_k must be at least 1; got 0"),
            ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
            ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
            ({"chunk": 0}, "chunk must be at least 1; got 0"),
        ],
    )
    def test_options_out_of_range(self, model: Model, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ZooError, match=message):
            model.generate(words(), 3, **options)

    def test_prompts_have_two_axes_and_a_token(self, model: Model) -> None:
        for prompt in (words()[0], words()[:, :0]):
            with pytest.raises(ZooError, match=r"expected a prompt \[batch, tokens\] with at least one token"):
                model.generate(prompt, 3)

    def test_only_language_models_generate(self) -> None:
        causal = language_model(causal=True, head={"type": "classifier", "classes": 2})
        for spec in (causal, image_model()):
            with pytest.raises(ZooError, match="language model"):
                build(spec).generate(words(), 3)


class TestChoosing:
    PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])

    def shares(self, **options: Any) -> Tensor:
        scores = self.PROBABILITIES.log().expand(20000, 4)
        drawn = choose(scores, generator=torch.Generator().manual_seed(0), **options)
        return torch.bincount(drawn, minlength=4) / 20000

    @pytest.mark.parametrize(
        "options, kept",
        [
            ({}, [0, 1, 2, 3]),
            ({"top_k": 2}, [1, 3]),
            ({"top_k": 9}, [0, 1, 2, 3]),
            ({"top_p": 0.45}, [1]),
            ({"top_p": 0.7}, [1, 3]),
            ({"top_p": 0.9}, [0, 1, 3]),
            ({"top_p": 1.0}, [0, 1, 2, 3]),
            ({"top_k": 1, "top_p": 0.9}, [1]),
            ({"top_k": 3, "top_p": 0.6}, [1, 3]),
        ],
    )
    def test_what_is_kept_keeps_its_shares(self, options: dict[str, Any], kept: list[int]) -> None:
        expected = torch.zeros(4)
        expected[kept] = self.PROBABILITIES[kept] / self.PROBABILITIES[kept].sum()
        found = self.shares(**options)
        assert torch.equal(found > 0, expected > 0)
        torch.testing.assert_close(found, expected, atol=0.015, rtol=0)

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_temperature_divides_scores(self, temperature: float) -> None:
        expected = (self.PROBABILITIES.log() / temperature).softmax(dim=0)
        torch.testing.assert_close(self.shares(temperature=temperature), expected, atol=0.015, rtol=0)


class TestFiles:
    def test_what_is_saved_loads_to_the_same_model(self, model: Model, tmp_path: Path) -> None:
        file = model.save(tmp_path / "model.safetensors")
        loaded = load_model(file).eval()
        assert loaded.spec == model.spec
        assert torch.equal(loaded(words()).logits, model(words()).logits)
        half = load_model(file, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert all(parameter.requires_grad for parameter in loaded.parameters())

    def test_weights_without_a_spec(self, tmp_path: Path) -> None:
        save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
        with pytest.raises(ZooError, match=r"bare\.safetensors: holds weights but no spec"):
            load_model(tmp_path / "bare.safetensors")

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(ZooError, match=r"missing\.safetensors"):
            load_model(tmp_path / "missing.safetensors")
        with pytest.raises(ZooError, match=tmp_path.name):
            load_model(tmp_path)

    @pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
    def test_a_file_cut_short(self, model: Model, tmp_path: Path, kept: float) -> None:
        file = model.save(tmp_path / "model.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
        with pytest.raises(ZooError, match=r"model\.safetensors: not a readable safetensors file"):
            load_model(file)

    def test_weights_that_do_not_fit(self, model: Model, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        tensors = {name: tensor.detach() for name, tensor in weights(model).items()}
        other = {**tensors, "body.final_norm.weight": torch.zeros(3)}
        fewer = {name: tensor for name, tensor in tensors.items() if name != "body.final_norm.weight"}
        for wrong in (other, fewer):
            save_file(wrong, file, metadata={"spec": zoo.dump(model.spec)})
            with pytest.raises(ZooError, match=r"do not fit the spec.*(\n.*)*final_norm\.weight"):
                load_model(file)

    def test_nothing_in_a_file_is_executed(self, tmp_path: Path) -> None:
        trace = tmp_path / "executed"

        class Bomb:
            def __reduce__(self) -> Any:
                return Path.touch, (trace,)

        file = tmp_path / "model.safetensors"
        for content in (pickle.dumps(Bomb()), pickle.dumps({"weights": Bomb()}, protocol=0)):
            file.write_bytes(content)
            with pytest.raises(ZooError, match="not a readable safetensors file"):
                load_model(file)
        torch.save({"weights": Bomb()}, file)
        with pytest.raises(ZooError, match="not a readable safetensors file"):
            load_model(file)
        tag = f"!!python/object/apply:os.system ['touch {trace}']"
        save_file({"a": torch.zeros(1)}, file, metadata={"spec": f"width: {tag}\n"})
        with pytest.raises(ZooError):
            load_model(file)
        assert not trace.exists()

    def test_a_header_that_promises_too_much(self, tmp_path: Path) -> None:
        header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ZooError, match="not a readable safetensors file"):
            load_model(file)

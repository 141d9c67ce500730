"""Mixtures of experts against the oracle: any routing, implementation that the config names, strategy and dtype."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import dpft
from dpft.errors import ClippingError, UnsupportedModuleError
from tests import oracle, zoo
from tests.clipping.against_oracle import Case, autocast, check, clipped_loss, make_case

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
E, K, WIDTH, INNER = 6, 2, 16, 24  # bf16 rows of 16 bytes, which torch's grouped products need
SIZES = {"num_experts_per_tok": K, "initializer_range": 0.12}
two_strategies = pytest.mark.parametrize("strategy", ["one_pass", "two_pass"])


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def gpt_oss(attention: str) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = hf.GptOssConfig(**zoo._sizes(head_dim=8, num_local_experts=E, rope_parameters=rope, **SIZES))
    return zoo.from_config(hf.GptOssForCausalLM, config, "eager")  # its sinks have no sdpa


def mixtral(attention: str) -> nn.Module:
    return zoo.from_config(
        hf.MixtralForCausalLM, hf.MixtralConfig(**zoo._sizes(num_local_experts=E, **SIZES)), attention
    )


def deepseek_v3(attention: str) -> nn.Module:
    lora = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": E, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
    config = hf.DeepseekV3Config(**zoo._sizes(first_k_dense_replace=1, **lora, **experts, **SIZES))
    return zoo.from_config(hf.DeepseekV3ForCausalLM, config, attention)


def nemotron_h(attention: str) -> nn.Module:
    """Experts without a gate."""
    experts = {"n_routed_experts": E, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24}
    layers = {"layers_block_type": ["attention", "moe"], "n_group": 1, "topk_group": 1, "head_dim": 8}
    sizes = {k: v for k, v in zoo._sizes(**SIZES).items() if k != "num_hidden_layers"}
    return zoo.from_config(hf.NemotronHForCausalLM, hf.NemotronHConfig(**sizes, **layers, **experts), attention)


def with_frozen_parts(build: Any) -> Any:
    """The same with generic experts."""

    def built(attention: str = "sdpa") -> nn.Module:
        model = zoo.generic_experts(build(attention))
        for module in model.modules():
            if hasattr(module, "sinks"):
                module.sinks.requires_grad_(False)
        return model

    return zoo.seeded(built)


MODELS = {
    build.__name__: zoo.Entry(build.__name__, with_frozen_parts(build), zoo.token_batch)
    for build in (zoo.qwen3_moe, gpt_oss, mixtral, deepseek_v3, nemotron_h)
}


@functools.cache
def model_case(name: str) -> Case:
    return make_case(MODELS[name], zoo.token_batch(4, 9))


def run_by(case: Case, implementation: str) -> Case:
    """The same case of a model that runs its experts otherwise."""

    def build() -> nn.Module:
        model: Any = case.build()
        model.set_experts_implementation(implementation)
        return model

    return dataclasses.replace(case, build=build)


@two_strategies
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, strategy: Any) -> None:
    """Each in another of the implementations; no implementation is asked by the wrapped model's forward."""
    implementation = IMPLEMENTATIONS[list(MODELS).index(name) % 3]
    model = check(run_by(model_case(name), implementation), strategy=strategy)
    assert dpft.stats(model).strategy == strategy


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_implementations(implementation: str) -> None:
    check(run_by(model_case("qwen3_moe"), implementation), strategy="one_pass")


@pytest.mark.slow  # a site does not know of checkpoints: other layers' tests see to it
@two_strategies
@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_checkpointing(name: str, checkpointing: str, strategy: Any) -> None:
    check(model_case(name), checkpointing, strategy=strategy)


@pytest.mark.parametrize("clipping", ["ghost", "fast", "per_sample"])
def test_modes(clipping: str) -> None:
    check(model_case("gpt_oss"), clipping=clipping)


@two_strategies
@pytest.mark.parametrize("ids", [[1, 0, 0, 1], [0, 1, 0, 0]])
def test_several_rows_of_an_example(ids: list[int], strategy: Any) -> None:
    """In order, in any order, and unevenly many: as in float64, row by row."""
    entry, batch = MODELS["gpt_oss"], zoo.token_batch(4, 9)
    alone = oracle.oracle(entry.build(), batch)
    joined = [{n: sum(alone.grads[r][n] for r in range(4) if ids[r] == i) for n in alone.grads[0]} for i in range(2)]
    exact = oracle.PerExample(alone.losses[:2], tuple(joined))  # type: ignore[arg-type]  # sums of tensors
    bound = float(exact.norms.min()) * 0.7
    model: Any = dpft.wrap(entry.build(), max_grad_norm=bound, strategy=strategy)
    model(**batch, example_ids=torch.tensor(ids)).loss.backward()
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(bound)) <= 1e-5
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0)


def test_frozen_experts_run_as_they_did() -> None:
    """The layers around them are trained: the library's own code, bit for bit."""
    model: Any = MODELS["qwen3_moe"].build()
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" not in name)
    batch = zoo.token_batch(4, 9)
    before = model(**batch).logits
    dpft.wrap(model, loss_chunk=None)
    assert all("forward" not in m.__dict__ for n, m in model.named_modules() if n.endswith("experts"))
    assert torch.equal(model(**batch).logits, before)


# ---------------------------------------------------------------------------------------------------------------------
# The module alone, with a routing that the batch contains


def config_of(**more: Any) -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "moe_hidden_size": WIDTH,
        "intermediate_size": INNER,
        "moe_intermediate_size": INNER,
    }
    counts = {"num_experts": E, "num_local_experts": E, "n_routed_experts": E, "num_experts_per_tok": K}
    act = {"hidden_act": "silu", "mlp_hidden_act": "relu2", "moe_latent_size": None, "post_norm_eps": 1e-6}
    swiglu = {"swiglu_alpha": 1.7, "swiglu_limit": 7.0}
    return types.SimpleNamespace(**sizes, **counts, **act, **swiglu, **{"_experts_implementation": "eager", **more})


class Box(nn.Module):
    """Experts between two linear layers: x [B, T, 6] -> [B, T, 6]; the routing is given, [B, T, k]."""

    def __init__(self, kind: type, implementation: str = "eager", way: str = "all") -> None:
        super().__init__()
        self.first, self.last, self.way = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6), way
        self.experts = kind(config_of(_experts_implementation=implementation))
        for p in self.experts.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        h = self.first(x)
        flat, index, weights = h.reshape(-1, WIDTH), index.reshape(-1, K), weights.reshape(-1, K)
        if self.way == "selection":  # of the tokens of one kind, as many of one example and as many of another
            keep = (index[:, 0] % 2 == 0).nonzero().squeeze(1)
            y = flat.index_copy(0, keep, self.experts(flat[keep], index[keep], weights[keep]))
        elif self.way == "twice":
            y = self.experts(self.experts(flat, index, weights), index.flip(1), weights)
        elif self.way == "reversed":
            y = self.experts(flat.flip(0), index.flip(0), weights.flip(0)).flip(0)
        else:
            y = self.experts(flat, index, weights)
        return self.last(torch.tanh(y.view(h.shape)))


ROUTINGS = ("spread", "two experts", "own expert", "nowhere")


def routed_batch(routing: str = "spread", examples: int = 4, tokens: int = 9) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    index = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(examples * tokens)])
    index = index.view(examples, tokens, K)
    if routing == "two experts":  # the others get no token
        index = torch.tensor([1, 4]).expand(examples, tokens, K).clone()
    if routing == "own expert":  # expert 5 gets tokens of one example, expert 0 a single one
        index = 1 + index % 4
        index[2, :, 0], index[1, 3, 1] = 5, 0
    if routing == "nowhere":  # slots that a mask has taken out, all of one token's among them
        index[:, ::3, 1] = E
        index[1, 2] = E
    shape = (examples, tokens)
    x, weights = torch.randn(*shape, 6, generator=g), torch.rand(*shape, K, generator=g)
    return {"x": x, "index": index, "weights": weights, "labels": torch.zeros(examples)}


def box_losses(model: nn.Module, batch: oracle.Batch) -> Tensor:
    y = model(batch["x"], batch["index"], batch["weights"])
    return y.square().flatten(1).mean(1) + y.flatten(1).mean(1)


def box_entry(kind: type, implementation: str = "eager") -> zoo.Entry:
    build = zoo.seeded(lambda attention: Box(kind, implementation))
    return zoo.Entry(f"{kind.__name__}-{implementation}", build, routed_batch, box_losses, causal=False)


@two_strategies
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", [Qwen3MoeExperts, NemotronHExperts, GptOssExperts])
def test_routings(kind: type, routing: str, strategy: Any) -> None:
    if kind is not Qwen3MoeExperts and routing == "nowhere":
        pytest.skip("transformers' own forward of it does not accept such indices")
    for examples in (4, 1) if routing == "spread" else (4,):
        check(make_case(box_entry(kind), routed_batch(routing, examples)), strategy=strategy)


@two_strategies
def test_slots_that_a_mask_has_taken_out(strategy: Any) -> None:
    """Biases and all: as a weight of zero would have it, whatever the weight is."""
    entry, batch = box_entry(GptOssExperts), routed_batch("nowhere")
    out = batch["index"] == E
    zeroed = {**batch, "index": batch["index"].clamp(max=E - 1), "weights": batch["weights"].masked_fill(out, 0)}
    exact = oracle.oracle(entry.build(), zeroed, box_losses)
    bound = float(exact.norms.median())
    # Where no gradient is asked for, the isolation check, transformers' own forward runs, and refuses such an index.
    model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=bound, isolation="off")
    clipped_loss(model, box_losses, batch, strategy).backward()
    assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(bound)) <= 1e-5
    torch.testing.assert_close(dpft.stats(model).norms.double(), exact.norms, rtol=1e-5, atol=0)


@two_strategies
def test_kept_gradients(strategy: Any) -> None:
    """So many tokens that the per-example gradients are the smaller, and segments longer than 16."""
    check(make_case(box_entry(Qwen3MoeExperts), routed_batch("own expert", 3, 70)), strategy=strategy)


@two_strategies
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_16_bits(how: str, strategy: Any) -> None:
    more: Any = {"dtype": torch.bfloat16} if how == "bf16" else {"context": autocast}
    for kind in (Qwen3MoeExperts, GptOssExperts):
        check(make_case(box_entry(kind), routed_batch(), **more), strategy=strategy)


@two_strategies
def test_a_frozen_norm_behind_the_experts(strategy: Any) -> None:
    entry = box_entry(MuseSparkExperts)

    def build(attention: str = "sdpa") -> nn.Module:
        model: Any = entry.build(attention)
        model.experts.post_expert_norm.requires_grad_(False)
        return model

    check(make_case(dataclasses.replace(entry, build=build), routed_batch()), strategy=strategy)
    with pytest.raises(UnsupportedModuleError, match="post_expert_norm"):
        dpft.wrap(entry.build(), strategy=strategy)


@two_strategies
def test_experts_that_are_used_twice(strategy: Any) -> None:
    """By two layers that share them: gradients are added before they are squared."""
    entry = box_entry(GptOssExperts)

    def build(attention: str = "sdpa") -> nn.Module:
        model: Any = entry.build(attention)
        model.way = "twice"
        return model

    check(make_case(dataclasses.replace(entry, build=build), routed_batch()), strategy=strategy)


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_proj_bias"])
@two_strategies
def test_a_part_of_the_experts(trained: str, strategy: Any) -> None:
    entry = box_entry(GptOssExperts)

    def build(attention: str = "sdpa") -> nn.Module:
        model = entry.build(attention)
        for name, p in model.named_parameters():
            p.requires_grad_(name in (f"experts.{trained}", "first.weight"))
        return model

    check(make_case(dataclasses.replace(entry, build=build), routed_batch()), strategy=strategy)


@pytest.mark.parametrize("how", ["float32", "bf16", "autocast"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", [Qwen3MoeExperts, GptOssExperts, NemotronHExperts])
def test_forward_is_that_of_transformers(kind: type, implementation: str, how: str) -> None:
    """Within the rounding of their sums of slots, in each of transformers' three implementations."""
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    model = box_entry(kind, implementation).build().to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in routed_batch().items()}
    h, index, weights = batch["x"] @ torch.ones(6, WIDTH, dtype=dtype), batch["index"], batch["weights"]
    flat = (h.view(-1, WIDTH), index.view(-1, K), weights.view(-1, K))
    with autocast() if how == "autocast" else torch.enable_grad():
        plain = model.experts(*flat)
        dpft.wrap(model)
        got = model.experts(*flat)
    assert got.dtype == plain.dtype and got.shape == plain.shape
    single = how == "float32" or (how == "autocast" and implementation == "grouped_mm")
    got, plain = got.detach(), plain.detach()
    error = float((got.double() - plain.double()).norm() / plain.double().norm())
    assert error <= (1e-6 if single else 2.0**-8)


@two_strategies
def test_an_example_that_is_not_finite_leaves_nothing(strategy: Any) -> None:
    """Its tokens are among those of the others in every expert's product."""
    for bad in (float("nan"), float("inf")):
        batch = routed_batch("two experts")
        batch["x"][2, 4, 1] = bad
        entry = box_entry(GptOssExperts)
        model = dpft.wrap(entry.build(), strategy=strategy, max_grad_norm=0.1)
        clipped_loss(model, box_losses, batch, strategy).backward()
        others = [0, 1, 3]
        exact = oracle.oracle(entry.build(), oracle.rows(batch, others), box_losses)
        assert dpft.stats(model).clip_factors[2] == 0
        assert oracle.relative_error(oracle.grads_of(model), exact.clipped_sum(0.1)) <= 1e-5


@two_strategies
def test_selected_tokens_are_refused(strategy: Any) -> None:
    """Also where the batch divides their number: which example one belongs to is not known."""
    batch = routed_batch()
    batch["index"][:, :, 0] = torch.arange(9) % 2  # five tokens of each example
    batch["index"][:, :, 1] = 3
    model = dpft.wrap(Box(Qwen3MoeExperts, way="selection"), strategy=strategy)
    with pytest.raises(ClippingError, match="not all tokens"):
        clipped_loss(model, box_losses, batch, strategy)


@two_strategies
def test_tokens_in_another_order_are_refused(strategy: Any) -> None:
    model = dpft.wrap(Box(Qwen3MoeExperts, way="reversed"), strategy=strategy)
    with pytest.raises(ClippingError, match="mixes examples"):
        clipped_loss(model, box_losses, routed_batch(), strategy).backward()


def test_refusals_by_name() -> None:
    parallel, other, shape = (Box(Qwen3MoeExperts) for _ in range(3))
    parallel.experts._is_expert_parallel = True
    other.experts.config._experts_implementation = "deepgemm"
    shape.experts.num_experts = 3
    for model, word in ((parallel, "expert parallelism"), (other, "deepgemm"), (shape, "its 3 experts")):
        with pytest.raises(UnsupportedModuleError, match=word):
            dpft.wrap(model)
    later = Box(Qwen3MoeExperts)
    dpft.wrap(later)
    later.experts.config._experts_implementation = "sonicmoe"
    with pytest.raises(UnsupportedModuleError, match="sonicmoe"):
        box_losses(later, routed_batch())


def test_experts_of_other_code_stay_refused() -> None:
    """A list of linear layers, and a subclass with a forward of its own."""

    class Mine(Qwen3MoeExperts):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args)  # type: ignore[no-any-return]  # transformers' is untyped

    model = Box(Qwen3MoeExperts)
    model.experts = nn.ModuleList([nn.Linear(6, 6)])
    with pytest.raises(UnsupportedModuleError, match="data-dependent"):
        dpft.wrap(model, strategy="one_pass")
    with pytest.raises(UnsupportedModuleError, match="gate_up_proj"):
        dpft.wrap(Box(Mine), strategy="one_pass")


def test_planning_figures() -> None:
    """What one-pass keeps of a layer's matrices: the pairs of tokens and slots, or, if smaller, the gradients."""
    model = dpft.wrap(Box(Qwen3MoeExperts), strategy="one_pass")
    lines = {line.split(":")[0]: line for line in dpft.explain(model, 4, 16).splitlines()}
    pairs = 4 * 16 * K * (WIDTH + 2 * INNER) * 4
    assert f"gram, keeps {pairs / 2**20:.2f} MiB" in lines[f"1 x {E} experts {WIDTH} -> {2 * INNER}"]
    assert "materialise" in dpft.explain(model, 2, 512)

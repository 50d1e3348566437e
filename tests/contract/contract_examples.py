"""Settings under which the package's own components are tried."""

from __future__ import annotations

from typing import Any

from zoo.component import Component
from zoo.registry import Role, components
from zoo.testing import Example

Settings = dict[str, Any]

MIXERS: dict[str, list[Settings]] = {
    "attention": [
        {"heads": 4},
        {"heads": 4, "causal": False},
        {"heads": 4, "kv_heads": 2, "head_dim": 6, "bias": True, "out_bias": True},
        {"heads": 2, "window": 5},
        {"heads": 2, "kv_heads": 1, "window": 1},
        {"heads": 2, "window": 4, "causal": False},
        {"heads": 2, "window": 20, "grid": (80,), "width": 16},
        {"heads": 4, "qk_norm": "rmsnorm", "softcap": 3.0},
        {"heads": 4, "kv_heads": 2, "position": "alibi", "window": 6},
        {"heads": 3, "head_dim": 8, "position": "none", "gate": "channel", "scale": 0.2},
        {"heads": 2, "position": {"type": "rotary", "fraction": 0.5, "interleaved": True}, "gate": "head"},
        {"heads": 2, "grid": (3, 4), "prefix": 1, "causal": False},
    ],
    "linear_attention": [
        {"heads": 2},
        {"heads": 2, "causal": False},
        {"heads": 2, "grid": (70,), "width": 16},
        {"heads": 2, "decay": "fixed", "gate": True, "key_dim": 6, "value_dim": 10},
        {"heads": 2, "decay": "fixed", "causal": False},
        {"heads": 4, "decay": "data", "bias": True},
        {"heads": 4, "decay": "data", "causal": False},
        {"heads": 2, "normaliser": "sum", "feature_map": "relu"},
        {"heads": 2, "normaliser": "sum", "decay": "data"},
        {"heads": 2, "normaliser": "sum", "causal": False, "position": "none"},
        {"heads": 2, "feature_map": "silu", "normaliser": None, "position": "none"},
        {"heads": 2, "feature_map": "identity", "norm": "layernorm"},
    ],
    "mamba": [
        {"state_dim": 4},
        {"hidden": 24, "state_dim": 3, "conv_kernel": 1, "conv_bias": False},
        {"expand": 1.0, "state_dim": 4, "bias": True, "normalize_inputs": True},
        {"state_dim": 4, "causal": False},
    ],
    "mamba2": [
        {"head_dim": 16, "state_dim": 8},
        {"head_dim": 8, "state_dim": 4, "groups": 2, "chunk": 4},
        {"head_dim": 8, "state_dim": 4, "norm_before_gate": True, "bias": True, "conv_bias": False, "conv_kernel": 2},
        {"head_dim": 16, "state_dim": 8, "causal": False},
    ],
    "pooling": [
        {},
        {"size": 5},
        {"causal": False},
        {"size": 5, "causal": False},
        {"grid": (3, 4), "prefix": 1, "causal": False},
    ],
    "token_mlp": [
        {"causal": False},
        {"hidden": 7, "bias": False, "causal": False},
        {"grid": (3, 4), "prefix": 1, "causal": False},
    ],
    "identity": [{}],
}
CHANNELS: dict[str, list[Settings]] = {
    "mlp": [{}, {"hidden": 20, "bias": True, "activation": "gelu", "dropout": 0.1}],
    "glu": [{}, {"ratio": 1.5, "bias": True, "activation": {"type": "gelu", "approximate": "tanh"}}],
    "moe": [
        {"experts": 4, "hidden": 12},
        {"experts": 4, "top_k": 1, "hidden": 12, "gated": False},
        {"experts": 4, "hidden": 12, "shared": 1, "scores": "sigmoid", "scale": 2.5, "z_loss": 0.001},
        {"experts": 4, "hidden": 12, "capacity": 1.0},
    ],
    "mohd": [
        {"subdims": 8, "shared": 2, "top_k": 2, "hidden": 24},
        {"subdims": 4, "shared": 0, "top_k": 1, "hidden": 24, "gated": False, "fusion": False},
        {"subdims": 4, "shared": 1, "top_k": 3, "hidden": 24, "scores": "sigmoid", "renormalize": False},
    ],
    "matformer": [
        {"ratios": [0.5, 1.0, 2.0]},
        {"hidden": [8, 16, 40], "active": 0, "gated": False},
        {"hidden": [8, 24], "active": 1, "probabilities": [0.25, 0.75], "activation": "gelu"},
    ],
}
ATTENTION = {"type": "attention", "heads": 2}
LAYER = {"mixer": ATTENTION, "channel": "glu"}
HYBRID = [
    LAYER,
    {"mixer": {"type": "mamba2", "head_dim": 16, "state_dim": 4}, "residual": "post"},
    {"channel": "mlp", "residual": {"type": "sandwich", "layer_scale": 0.5}},
]
IMAGE = {"image": [8, 6], "size": 2}
STAGES = [
    {"width": 16, "layers": [{"mixer": "pooling", "channel": "mlp"}]},
    {"width": 32, "reduce": "merge", "layers": [LAYER, LAYER]},
]
OTHERS: dict[Role, dict[str, list[Settings]]] = {
    Role.NORM: {"rmsnorm": [{}], "layernorm": [{}, {"bias": False}]},
    Role.ACTIVATION: {"gelu": [{}, {"approximate": "tanh"}]},
    Role.LINEAR: {"dense": [{}]},
    Role.POSITION: {
        "rotary": [{}, {"base": 500.0, "fraction": 0.5}],
        "learned": [{}, {"grid": (3, 4)}],
        "sinusoidal": [{}, {"causal": False}],
    },
    Role.RESIDUAL: {
        "pre": [{}, {"layer_scale": 0.5, "drop_path": 0.2, "dropout": 0.1}],
        "post": [{}, {"layer_scale": 0.5}],
        "sandwich": [{}, {"layer_scale": 0.5}],
        "parallel": [{}, {"layer_scale": 0.5, "drop_path": 0.2}],
    },
    Role.STEM: {
        "token": [{"vocab": 11}, {"vocab": 11, "scale": 5.6, "position": "learned", "dropout": 0.1}],
        "patch": [IMAGE, {**IMAGE, "class_token": True, "channels": 1}],
    },
    Role.REDUCE: {"merge": [{}]},
    Role.LAYER: {
        "layer": [
            LAYER,
            {"mixer": ATTENTION, "norm": "layernorm", "position": "alibi", "residual": "parallel", "channel": "mlp"},
            {"mixer": {"type": "mamba", "state_dim": 4}},
            {"channel": "glu"},
            {**LAYER, "grid": (3, 4), "causal": False},
        ]
    },
    Role.STAGE: {
        "stage": [
            {"width": 32, "layers": [LAYER], "grid": (4, 3)},
            {"width": 24, "reduce": "merge", "layers": [LAYER], "grid": (4, 6)},
        ]
    },
    Role.BODY: {
        "stack": [
            {"layers": HYBRID},
            {"layers": [LAYER], "final_norm": False, "norm": "layernorm", "position": "none", "grid": (3, 4)},
        ],
        "stages": [
            {"stages": STAGES, "width": 16, "grid": (4, 6)},
            {"stages": [*STAGES, {"width": 32, "layers": [LAYER]}], "width": 16, "position": "rotary", "grid": (4, 4)},
            {"stages": [{"width": 32, "layers": [LAYER]}, {"width": 32, "layers": HYBRID}], "final_norm": False},
        ],
    },
    Role.HEAD: {
        "language_model": [{}, {"tied": False, "softcap": 4.0}],
        "classifier": [{"classes": 3}, {"classes": 3, "pool": "mean", "bias": False, "grid": (3, 4)}],
        "regression": [{}, {"outputs": 2, "pool": "mean"}],
    },
    Role.MODEL: {
        "model": [
            {
                "width": 16,
                "context": 12,
                "init_std": 0.3,
                "stem": {"type": "token", "vocab": 11},
                "body": {"layers": HYBRID},
                "head": "language_model",
            },
            {
                "width": 16,
                "init_std": 0.3,
                "stem": {"type": "patch", **IMAGE, "class_token": True},
                "body": {"layers": [LAYER, {"mixer": "token_mlp", "channel": "mlp"}]},
                "head": {"type": "classifier", "classes": 3},
            },
        ]
    },
}
EXAMPLES = {Role.MIXER: MIXERS, Role.CHANNEL: CHANNELS} | OTHERS
PLACE = {"grid", "prefix", "idle"}


def example(component: type[Component], settings: Settings) -> Example:
    """An example of a component: what names its place is taken out of the settings."""
    place = {name: value for name, value in settings.items() if name in PLACE}
    if "causal" in settings:
        place["causal"] = settings["causal"]
    if component.role not in (Role.MODEL, Role.STAGE) and "width" in settings:
        place["width"] = settings["width"]
    own = {name: value for name, value in settings.items() if name not in place}
    return Example(component(**own), **place)


def examples() -> list[Example]:
    """Those of all components that the package itself registers; without settings where the table has none."""
    return [
        example(component, settings)
        for component in components()
        if component.__module__.startswith("zoo.")
        for settings in EXAMPLES.get(component.role, {}).get(component.type, [{}])
    ]


def unknown() -> list[str]:
    """What the table has for types that are not registered."""
    known = {(component.role, component.type) for component in components()}
    return [f"{role} {name}" for role, table in EXAMPLES.items() for name in table if (role, name) not in known]

"""Hooks: seen, replaced, gone, and refused where they would not fire."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import neuronlens as nl
from neuronlens import testbed
from neuronlens.errors import CaptureError
from neuronlens.hooks import hooked, refuse_compiled, uncompiled, watched


class Halting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("halted")


class Masked(nn.Module):
    """Takes arguments by position, by name, with defaults, and any others."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, **rest
    ) -> Tensor:
        return x * scale


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks_with_kwargs,
            module._backward_hooks,
        )
    )


def look(_name: str, _out: Tensor) -> None:
    """Change nothing."""


# hooked


def test_a_hook_that_returns_nothing_sees_the_output_and_leaves_it_alone(mlp):
    x, seen = torch.randn(5, 4), {}
    plain = mlp(x)
    with hooked({"act": mlp[1], "down": mlp[2]}, seen.__setitem__):
        hooked_out = mlp(x)
    assert torch.equal(hooked_out, plain)
    torch.testing.assert_close(seen["act"], mlp[0](x).clamp(min=0), atol=0, rtol=0)
    torch.testing.assert_close(seen["down"], plain, atol=0, rtol=0)


def test_a_hook_that_returns_a_tensor_replaces_the_output(mlp):
    x = torch.randn(5, 4)
    with hooked({"act": mlp[1]}, lambda _name, out: torch.zeros_like(out)):
        silenced = mlp(x)
    torch.testing.assert_close(silenced, mlp[2].bias.expand(5, 2), atol=0, rtol=0)
    assert not torch.equal(mlp(x), silenced)


def test_hooks_are_gone_when_the_block_ends(mlp):
    with hooked({"act": mlp[1]}, look):
        assert hooks_of(mlp) > 0
        mlp(torch.zeros(1, 4))
    assert hooks_of(mlp) == 0


def test_hooks_are_gone_even_when_the_forward_raises(mlp):
    broken = nn.Sequential(mlp, Halting())
    with pytest.raises(ArithmeticError), hooked({"act": mlp[1], "end": broken[1]}, look):
        broken(torch.zeros(1, 4))
    assert hooks_of(broken) == 0


def test_hooks_are_gone_even_when_the_hook_raises(mlp):
    def refuse(_name: str, _out: Tensor) -> None:
        raise ArithmeticError("refused")

    with pytest.raises(ArithmeticError), hooked({"act": mlp[1]}, refuse):
        mlp(torch.zeros(1, 4))
    assert hooks_of(mlp) == 0


def test_hooks_are_gone_even_when_one_cannot_be_attached(mlp):
    with pytest.raises(AttributeError), hooked({"act": mlp[1], "typo": object()}, look):
        raise AssertionError("the block must not be entered")
    assert hooks_of(mlp) == 0


def test_an_inner_block_takes_only_its_own_hooks_away(mlp):
    x, outer, inner = torch.randn(5, 4), [], []
    with hooked({"act": mlp[1]}, lambda _name, out: outer.append(out)):
        with hooked({"act": mlp[1]}, lambda _name, out: inner.append(out)):
            mlp(x)
        mlp(x)
    assert (len(outer), len(inner)) == (2, 1)
    assert hooks_of(mlp) == 0


def test_hooks_of_others_stay(mlp):
    seen = []
    theirs = mlp[1].register_forward_hook(lambda *_: seen.append("theirs"))
    with hooked({"act": mlp[1]}, look):
        mlp(torch.zeros(1, 4))
    mlp(torch.zeros(1, 4))
    assert seen == ["theirs", "theirs"]
    theirs.remove()


def test_a_module_that_never_ran_is_an_error_that_names_it(mlp):
    with (
        pytest.raises(
            CaptureError, match=r"1 of 2 hooked modules never ran: other\..*another model\?"
        ),
        hooked({"act": mlp[1], "other": nn.ReLU()}, look),
    ):
        mlp(torch.zeros(1, 4))


def test_of_many_modules_that_never_ran_eight_are_named(mlp):
    modules = {f"m{n}": nn.ReLU() for n in range(9)}
    with (
        pytest.raises(CaptureError, match=r"9 of 9 .*: m0, m1, .*, m7, \.\.\.\."),
        hooked(modules, look),
    ):
        mlp(torch.zeros(1, 4))


def test_an_error_in_the_block_is_not_hidden_behind_what_never_ran(mlp):
    with pytest.raises(KeyError, match="mine"), hooked({"act": mlp[1]}, look):
        raise KeyError("mine")


def test_the_block_can_ask_what_has_not_run_yet(mlp):
    with hooked({"act": mlp[1], "down": mlp[2]}, look) as unseen:
        assert unseen == {"act", "down"}
        mlp[:2](torch.zeros(1, 4))
        assert unseen == {"down"}
        mlp(torch.zeros(1, 4))
        assert unseen == set()


# watched


def test_arguments_are_seen_by_name_however_they_were_given():
    model, seen = Masked(), []
    x, mask = torch.ones(2), torch.zeros(2)
    with watched(model, seen.append, lambda: None):
        model(x, mask, scale=2.0, extra="yes")
        model(x=x)
    assert seen[0] == {"x": x, "mask": mask, "scale": 2.0, "extra": "yes"}
    assert list(seen[1]) == ["x"]


def test_after_is_called_once_a_call_is_over_and_not_when_it_raised():
    told = []
    model = Halting()
    with (
        pytest.raises(ArithmeticError),
        watched(model, lambda _inputs: told.append("before"), lambda: told.append("after")),
    ):
        model(torch.zeros(1))
    assert told == ["before"]
    model = Masked()
    with watched(model, lambda _inputs: told.append("before"), lambda: told.append("after")):
        model(torch.zeros(1))
    assert told == ["before", "before", "after"]


def test_a_watched_model_is_left_alone_after_the_block_and_after_an_error(mlp):
    told = []
    with watched(mlp, told.append, lambda: None):
        pass
    with pytest.raises(KeyError), watched(mlp, told.append, lambda: None):
        raise KeyError
    mlp(torch.zeros(1, 4))
    assert told == []
    assert hooks_of(mlp) == 0


# uncompiled


@pytest.fixture
def counted():
    """A compiled function, and how often its compiled code ran."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, _inputs):
        def run(*args):
            runs.append("compiled")
            return graph.forward(*args)

        return run

    yield torch.compile(lambda x: x.sin() + 1, backend=backend), runs
    torch._dynamo.reset()


def test_compiled_code_runs_as_plain_python_in_the_block_and_compiled_again_after_it(counted):
    function, runs = counted
    x = torch.randn(3)
    function(x)
    assert len(runs) == 1
    with uncompiled():
        torch.testing.assert_close(function(x), x.sin() + 1)
        assert len(runs) == 1
    function(x)
    assert len(runs) == 2


def test_code_compiles_again_after_an_error_in_the_block(counted):
    function, runs = counted
    with pytest.raises(ArithmeticError), uncompiled():
        raise ArithmeticError
    function(torch.randn(3))
    assert len(runs) == 1


# refuse_compiled


def compiled_as_a_whole(model):
    return torch.compile(model)


def compiled_in_place(model):
    model.compile()
    return model


def with_a_compiled_part(model):
    model.model.language_model = torch.compile(model.model.language_model)
    return model


def with_a_part_compiled_in_place(model):
    model.model.vision_tower.encoder.layers[1].compile()
    return model


@pytest.mark.parametrize(
    ("compiling", "where"),
    [
        (compiled_as_a_whole, "as a whole"),
        (compiled_in_place, "as a whole"),
        (with_a_compiled_part, r"model\.language_model"),
        (with_a_part_compiled_in_place, r"model\.vision_tower\.encoder\.layers\.1"),
    ],
)
def test_a_compiled_model_is_refused_and_the_compiled_part_named(compiling, where):
    model = compiling(testbed.untrained())
    with pytest.raises(CaptureError, match=rf"compiled \(.*{where}.*before torch\.compile"):
        refuse_compiled(model)
    with pytest.raises(CaptureError, match=where):
        nl.adapt(model)


def test_a_model_compiled_after_it_was_adapted_is_refused_when_it_is_recorded():
    model = testbed.untrained()
    vlm = nl.adapt(model)
    model.model.language_model.compile()
    with pytest.raises(CaptureError, match="language_model"):
        nl.ActivationRecorder(vlm)
    with pytest.raises(CaptureError, match="language_model"), nl.record(vlm, None, None, {}):
        raise AssertionError("the block must not be entered")


def test_the_model_before_torch_compile_is_accepted():
    model = testbed.untrained()
    torch.compile(model)
    refuse_compiled(model)
    assert nl.adapt(model).model is model

"""The public contract, name by name. More may be added; nothing here may be lost or change its meaning."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from pathlib import Path

import pytest
import typer

import pylumiere
from pylumiere import errors

NAMES = (
    "__version__ Engine GenerationRequest Progress Video "
    "BudgetExceeded BundleError Cancelled IntegrityError InvalidRequest UnsupportedDevice VideoError"
)

# Class to method to parameters, as they are written in a definition.
METHODS = {
    "Engine": {
        "load": "source='demo', *, backend='auto', device='auto', precision='auto', memory_budget=None, "
        "reproducible=None, trusted_key=None, **limits",
        "generate": "self, prompt, **fields",
        "stream": "self, prompt, **fields",
        "submit": "self, prompt, *, timeout=None, buffer_frames=None, **fields",
        "upscale": "self, frames, *, fps=None, num_frames=None, seed=0, loop=False, num_inference_steps=None, "
        "window_frames=None, window_overlap=None, callback_on_step_end=None, output_type='uint8'",
        "warm_up": "self, shapes=({},)",
        "metrics": "self",
        "info": "self",
        "styles": "self",
        "close": "self, drain=False, timeout=None",
        "__enter__": "self",
        "__exit__": "self, *_",
    },
    "Job": {
        "cancel": "self",
        "result": "self, timeout=None",
        "frames": "self",
        "__await__": "self",
    },
    "Stream": {
        "__iter__": "self",
        "__next__": "self",
        "close": "self",
        "collect": "self",
        "__enter__": "self",
        "__exit__": "self, *_",
    },
    "Video": {
        "__init__": "self, frames, fps, metadata=None",
        "save": "self, path",
        "sheet": "self, path, *, every=8, columns=5, caption=None",
    },
}
LIMITS = "max_batch max_running max_queue"

FIELDS = {
    "negative_prompt": "", "num_frames": None, "fps": None, "height": None, "width": None, "num_inference_steps": None,
    "guidance_scale": None, "seed": None, "sampler": None, "image": None, "keyframes": None, "video": None,
    "mask": None, "expand": None, "fit": "crop", "strength": 1.0, "style": None, "style_strength": 1.0, "loop": False,
    "window_frames": None, "window_overlap": None, "callback_on_step_end": None, "output_type": "uint8",
}  # fmt: skip

# What an object of each kind has.
ATTRIBUTES = {
    "Video": "frames fps metadata",
    "Job": "request progress metadata status done",
    "Stream": "metadata fps seed num_frames height width",
    "Chunk": "start frames",
    "Progress": "stage step steps frames_final num_frames seconds_left",
}
METADATA = (
    "model prompt negative_prompt seed num_frames fps height width sampler num_inference_steps guidance_scale "
    "application style loop backend device precision seconds"
)
INFO = (
    "model folder backend device precision reason reproducible num_threads text_encoder parameters weight_bytes "
    "memory_budget defaults versions"
)

ERRORS = {
    "InvalidRequest": ValueError,
    "BundleError": ValueError,
    "IntegrityError": errors.BundleError,
    "UnsupportedDevice": RuntimeError,
    "BudgetExceeded": MemoryError,
    "Cancelled": RuntimeError,
    "DeadlineExceeded": TimeoutError,
    "QueueFull": RuntimeError,
    "VideoError": ValueError,
}

# Verb to its arguments, in order, and its options.
VERBS = {
    "generate": "prompt -o --output --model --backend --device --precision --key --steps --guidance --sampler --seed "
    "--frames --fps --size --negative --image --keyframes --video --mask --expand --fit --strength --style "
    "--style-strength --loop --window --overlap --stream --sheet --json",
    "upscale": "source -o --output --model --backend --device --precision --key --steps --seed --fps --window "
    "--overlap --loop --sheet --json",
    "doctor": "model --json",
    "serve": "--model --host --port --data --api-keys --alias --backend --device --precision --key --memory-budget "
    "--concurrency --queue-limit --max-body --max-pixels --max-decoded --max-frames --deadline --keep-for --keep-size",
    "serve-key": "name --file --jobs --requests-per-minute",
    "export": "-o --output --model --sku --precision --batch --frames --size --per-sm --memory-budget --sign --jobs "
    "--force --json",
    "inspect": "path --key --sku --backend --precision --json",
    "verify": "path --key --full --json",
    "keygen": "private --public",
    "bench ops": "--op --smoke --tune --json --vs --against",
    "bench model": "--model --stage --vs --precision --max-autotune --smoke --repeats --json --against",
    "bench e2e": "--model --vs --rounds --seed --steps --json --against",
    "bench plan": "--model --sku --frames --size --steps --ssr-steps --window --overlap --doubling --rates --json",
}
EXTRAS = "export tensorrt gpu serve ray bench dev"


MODEL = Path(__file__).resolve().parent / "data" / "old" / "tiny.plm"


@pytest.fixture(scope="module")
def engine():
    with pylumiere.Engine.load(MODEL, backend="torch", device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def made(engine):
    """One object of each kind, by the name of its class."""
    seen = []
    job = engine.submit("a red circle", seed=7, callback_on_step_end=seen.append)
    video = job.result(timeout=60)
    stream = engine.stream("a red circle", seed=7)
    return {"Video": video, "Job": job, "Stream": stream, "Chunk": next(stream), "Progress": seen[0]}


def public_class(name):
    home = pylumiere if name in pylumiere.__all__ else importlib.import_module("pylumiere.engine")
    return getattr(home, name)


def test_no_name_of_the_package_is_lost():
    assert set(NAMES.split()) <= set(pylumiere.__all__)


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in METHODS.items() for name in names])
def test_no_method_loses_a_parameter(owner, name):
    """Order, default and kind stay; what is added has a default."""
    now = inspect.signature(getattr(public_class(owner), name)).parameters
    then = inspect.signature(eval(f"lambda {METHODS[owner][name]}: None")).parameters
    for parameter in then.values():
        assert parameter.name in now
        found = now[parameter.name]
        assert found.kind in (parameter.kind, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if (owner, name, parameter.name) != ("Video", "__init__", "metadata"):  # it has a factory
            assert found.default == parameter.default
    positional = [p.name for p in then.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(now)[: len(positional)] == positional
    for parameter in now.values():
        is_variable = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        assert parameter.name in then or is_variable or parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize("limit", LIMITS.split())
def test_no_limit_of_load_is_lost(limit):
    with pytest.raises(pylumiere.InvalidRequest, match=f"{limit}=-1"):
        pylumiere.Engine.load(MODEL, device="cpu", **{limit: -1})


def test_no_field_of_a_request_is_lost():
    request = pylumiere.GenerationRequest(prompt="a red circle")
    assert {name: getattr(request, name) for name in FIELDS} == FIELDS
    with pytest.raises(pylumiere.InvalidRequest, match="prompt"):
        pylumiere.GenerationRequest()


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_no_attribute_is_lost(made, kind):
    assert type(made[kind]) is public_class(kind)
    for name in ATTRIBUTES[kind].split():
        assert hasattr(made[kind], name)


def test_no_fact_about_a_clip_or_an_engine_is_lost(made, engine):
    assert set(METADATA.split()) <= set(made["Video"].metadata)
    assert set(INFO.split()) <= set(engine.info())


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_keeps_its_base(name):
    assert issubclass(getattr(errors, name), ERRORS[name])
    if name in pylumiere.__all__:
        assert getattr(pylumiere, name) is getattr(errors, name)


def verbs(command, path=()):
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    return {verb: c for name, inner in command.commands.items() for verb, c in verbs(inner, (*path, name)).items()}


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_of_the_command_line_is_lost(verb):
    from pylumiere.cli.app import app

    command = verbs(typer.main.get_command(app))[verb]
    arguments = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
    options = {option for parameter in command.params for option in parameter.opts}
    known = VERBS[verb].split()
    assert arguments == [name for name in known if not name.startswith("-")]
    assert {name for name in known if name.startswith("-")} <= options


def test_the_command_and_the_extras_are_there():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="pylumiere")
    assert script.value == "pylumiere.cli:main"
    assert callable(script.load())
    assert set(EXTRAS.split()) <= set(importlib.metadata.metadata("pylumiere").get_all("Provides-Extra"))

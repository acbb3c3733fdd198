"""What a model adapter is: a description of one vision-language model, and the registry."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from typing import Any, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from packaging.requirements import Requirement
from torch import Tensor, nn

from neuronlens.adapters.change import Change
from neuronlens.adapters.decoding import Decoding, decoding_of
from neuronlens.adapters.grids import ImageSize
from neuronlens.adapters.taps import ActOutput, NeuronKind, Tap, weights_here
from neuronlens.errors import AdapterError, UnknownNameError
from neuronlens.hooks import refuse_compiled
from neuronlens.neurons import Module, NeuronId, NeuronSite
from neuronlens.show import Html, table
from neuronlens.tokens import Role, TokenMap

SiteSelection = str | NeuronSite | Iterable[str | NeuronSite] | None
"""A module, a site's name, a site, several of these, or None for every site."""


_changes: WeakKeyDictionary[nn.Module, dict[str, list[Change]]] = WeakKeyDictionary()


class ModelAdapter(ABC):
    """Where a model's neurons are, and what each of its tokens is and sees.

    The model stays the untouched Hugging Face object. A family is described by a subclass
    that finds the sites and maps the tokens; everything else is shared.

    Attributes:
        model: The Hugging Face model.
        processor: Its processor; None if `adapt` was given none.
        sites: Every feed-forward site, by name, in the order in which they run.
        neuron_kind: What is read as a neuron's activation: `"act_fn"`, its output (both
            papers), or `"down_input"`, what the down projection takes: the output times the
            up projection's, or the output where there is none.
        taps: How each site is read, by its name; the output of the module at its path if
            it is not there.
        changes: By site, what is in force at the moment, in the order of entering.
        max_tokens: How many tokens the model takes; None if that is not known.
        text_input: Name of the inputs that hold the language stream's token ids.
        growing: Streams that generation adds tokens to.
        answer_stream: The stream that reads a sample's response: the decoder's of an
            encoder-decoder model.
        one_image: Whether the model takes one image with each text, and not several.
        before_response: What is written between prompt and response where no chat template is.
        prefixes_images: Whether image tokens are put before the text by the model, so that
            the language stream is longer than the text.
    """

    max_tokens: int | None = None
    text_input: str = "input_ids"
    growing: tuple[str, ...] = ("language",)
    answer_stream: str = "language"
    one_image: bool = False
    before_response: str = " "
    prefixes_images: bool = False

    def __init__(
        self, model: nn.Module, processor: Any = None, neuron: NeuronKind = "act_fn"
    ) -> None:
        if neuron not in get_args(NeuronKind):
            raise UnknownNameError("kind of neuron", neuron, get_args(NeuronKind))
        self.model = model
        self.processor = processor
        self.neuron_kind: NeuronKind = neuron
        self.taps: dict[str, Tap] = {}
        # Two adapters of one model know of each other's.
        self.changes = _changes.setdefault(model, {})
        self._config: Any = model.config
        text = getattr(self._config, "get_text_config", lambda: self._config)()
        self.max_tokens = getattr(text, "max_position_embeddings", None)
        self.check_model()
        if processor is not None:
            self.check_processor()
        found = list(self.find_sites())
        self.sites: Mapping[str, NeuronSite] = {site.name: site for site in found}
        if len(self.sites) < len(found):
            raise AdapterError(
                f"{type(self).__name__} gives the same name to several sites of this "
                f"{type(model).__name__}; neurons would be mixed up. Name each site differently."
            )
        if not self.sites:
            raise AdapterError(
                f"{type(model).__name__} has no feed-forward block that {type(self).__name__} "
                "recognises. Is this the adapter of another family?"
            )

    # What a family says of itself.

    @abstractmethod
    def find_sites(self) -> Iterable[NeuronSite]:
        """Every feed-forward site that runs for an image and a text."""

    @abstractmethod
    def tokens(
        self,
        inputs: Mapping[str, Any],
        originals: Sequence[Sequence[ImageSize]] | None = None,
    ) -> dict[str, TokenMap]:
        """The token map of every stream for these model inputs.

        Args:
            inputs: Keyword arguments of a forward from the start of the sequence.
            originals: Per sample, the size of each image before processing. With it,
                boxes are in original pixels; without, in processed pixels.

        Raises:
            AdapterError: If the inputs cannot be those of this model.
        """

    def check_model(self) -> None:  # noqa: B027 - a family may have nothing to check
        """Raise `AdapterError` for a model the family's description does not hold for."""

    def check_processor(self) -> None:  # noqa: B027
        """Raise `AdapterError` for a processor made for another model."""

    # What everything else uses.

    def neuron(
        self, layer: int, index: int, module: Module = "language", expert: int | None = None
    ) -> NeuronId:
        """A neuron the way papers name it: layer and index, in the language model by default.

        In an encoder-decoder that is the stack with the image tokens; a neuron of the other is
        `site("language.decoder.3").neuron(5)`.

        Raises:
            UnknownNameError: If there is no such layer or neuron.
        """
        return self.site(f"{module}.{layer}").neuron(index, expert)

    def site(self, name: str) -> NeuronSite:
        """The site of that name.

        Raises:
            UnknownNameError: If there is none; lists near names.
        """
        if name not in self.sites:
            raise UnknownNameError("site", name, self.sites)
        return self.sites[name]

    def select(self, chosen: SiteSelection = None) -> list[NeuronSite]:
        """Sites by module, by stream, by name or as they are; all of them for None.

        A name that is a site's is that site, also where a stream is called the same.

        Raises:
            UnknownNameError: If a name is neither a site nor a module or stream of this model.
        """
        if chosen is None:
            return list(self.sites.values())
        wanted = [chosen] if isinstance(chosen, (str, NeuronSite)) else list(chosen)
        found: dict[str, NeuronSite] = {}
        streams = {site.stream for site in self.sites.values()}
        for each in wanted:
            if isinstance(each, str) and each in get_args(Module):
                sites = [site for site in self.sites.values() if site.module == each]
                if not sites:
                    present = sorted({site.module for site in self.sites.values()})
                    raise UnknownNameError("module in this model", each, present)
            elif isinstance(each, str) and each not in self.sites and each in streams:
                sites = [site for site in self.sites.values() if site.stream == each]
            else:
                sites = [self.site(each if isinstance(each, str) else each.name)]
            found |= {site.name: site for site in sites}
        return [site for name, site in self.sites.items() if name in found]

    def tap(self, site: NeuronSite) -> Tap:
        """How the site's activations are read and written."""
        return self.taps.get(site.name) or ActOutput(site.path)

    @property
    def changed(self) -> set[NeuronId]:
        """The neurons that interventions change at the moment."""
        return {
            NeuronId(site, index, expert)
            for site, changes in self.changes.items()
            for change in changes
            for expert in change.experts
            for index in change.columns(expert, torch.device("cpu")).tolist()
        }

    def text_roles(
        self, ids: Int[Tensor, "batch token"], attention: Tensor | None = None
    ) -> Int[Tensor, "batch token"]:
        """SPECIAL for the tokenizer's special tokens, PAD where not attended, else PROMPT."""
        special: set[int | None] = set()
        for config in (self._config, self._config.get_text_config()):
            for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, kind, None)
                special |= set(value if isinstance(value, list) else [value])
        if self.processor is not None:
            special |= set(self.processor.tokenizer.all_special_ids)
            special.discard(self.processor.tokenizer.unk_token_id)
        ids = ids.cpu()
        known = torch.tensor(sorted(each for each in special if each is not None))
        role = torch.full_like(ids, int(Role.PROMPT), dtype=torch.int8)
        role[torch.isin(ids, known)] = Role.SPECIAL
        if attention is not None:
            role[attention.cpu() == 0] = Role.PAD
        return role

    @property
    def text_mask(self) -> str:
        """Name of the inputs that tell which tokens of `text_input` are no padding."""
        return self.text_input.replace("input_ids", "attention_mask")

    def placeholder_ids(self) -> list[int]:
        """The token ids that images take the place of."""
        found = getattr(self.processor, "image_token_id", None)
        return [] if found is None else [int(found)]

    @property
    def image_token(self) -> str:
        """What stands for one image in a text that is given to the processor; "" for nothing."""
        return str(getattr(self.processor, "image_token", "") or "")

    @property
    def image_text(self) -> str:
        """What is written for one image where no chat template is used: `image_token`, marked."""
        return self.image_token

    def as_processed(self, text: str) -> str:
        """The text as the processor tokenises it, but for the expansion of image tokens.

        For processors that rewrite text, such as one that puts spaces around images.
        """
        return text

    def process(
        self, texts: Sequence[str], images: Sequence[Sequence[Any]], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The processor's inputs for a batch, padded; per text, its images.

        Args:
            texts: With image tokens and chat markers.
            images: Pictures of each text.
            add_special_tokens: Whether the tokenizer adds its own (BOS).
        """
        inputs: Mapping[str, Any] = self.processor(
            images=[list(each) for each in images],
            text=list(texts),
            add_special_tokens=add_special_tokens,
            padding=True,
            return_tensors="pt",
        )
        return dict(inputs)

    def with_answers(self, inputs: Mapping[str, Any], answers: Sequence[str]) -> dict[str, Any]:
        """The inputs with the responses for the decoder of an encoder-decoder model.

        Each begins with the decoder's start token and is padded on the right.
        """
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id or 0
        said = [
            getattr(config, "decoder_start_token_id", None)
            for config in (
                getattr(self.model, "generation_config", None),
                self._config.get_text_config(decoder=True),
                self._config,
            )
        ]
        start = next((each for each in (*said, tokenizer.bos_token_id) if each is not None), pad)
        ids = [
            torch.tensor([start, *tokenizer(answer, add_special_tokens=False)["input_ids"]])
            for answer in answers
        ]
        rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(each) for each in ids])
        mask = (torch.arange(rows.shape[1]) < lengths[:, None]).long()
        return {**inputs, "decoder_input_ids": rows, "decoder_attention_mask": mask}

    @cached_property
    def decoding(self) -> Decoding:
        """The way from the output of any decoder layer to the model's logits.

        Raises:
            AdapterError: If the model has none; the message says why.
        """
        return decoding_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        first = next(self.model.parameters()).device
        if first.type != "meta":
            return first
        for module in self.model.modules():  # accelerate keeps weights elsewhere meanwhile
            hook: Any = getattr(module, "_hf_hook", None)
            for each in getattr(hook, "hooks", (hook,)):
                device = getattr(each, "execution_device", None)
                if device is not None:
                    return torch.device(device)
        return first

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type the model computes in."""
        kinds = (parameter.dtype for parameter in self.model.parameters())
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    @property
    def model_type(self) -> str:
        """The name under which the model's family is registered."""
        return str(self._config.model_type)

    @property
    def name(self) -> str:
        """What the model was loaded from, or its class."""
        return str(getattr(self._config, "name_or_path", "") or type(self.model).__name__)

    @property
    def revision(self) -> str | None:
        """The commit of the model hub it was loaded from; None if there was none."""
        found = getattr(self._config, "_commit_hash", None)
        return None if found is None else str(found)

    def fingerprint(self) -> str:
        """A digest of the weights: 64 values of every parameter, their shapes and names.

        Products of one model carry it, so that they are not read beside another.
        """
        digest = hashlib.sha256()
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            names = [
                name
                for name, parameter in module.named_parameters(recurse=False)
                if id(parameter) not in seen
            ]
            seen.update(id(parameter) for parameter in module.parameters(recurse=False))
            with weights_here(module):
                own = dict(module.named_parameters(recurse=False))
                for name in names:
                    flat = own[name].detach().flatten()
                    step = max(1, len(flat) // 64)
                    digest.update(f"{path}.{name} {tuple(own[name].shape)}".lstrip(".").encode())
                    digest.update(flat[::step][:64].to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()[:32]

    def forward(self, inputs: Mapping[str, Any], *, logits: bool = True) -> Any:
        """Run the model, without a cache where it has the choice.

        Args:
            inputs: Its named arguments.
            logits: Whether the logits of every token are wanted. Without, those of the last one
                are computed alone where the model has the choice; nothing before them changes.
        """
        accepted = inspect.signature(self.model.forward).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        extra: dict[str, Any] = {}
        if "use_cache" in accepted or takes_all:
            extra["use_cache"] = False
        if not logits and "logits_to_keep" in accepted:
            # No number: given one, Gemma 4 leaves tokens out of its last layers.
            extra["logits_to_keep"] = slice(-1, None)
        return self.model(**inputs, **extra)

    def require_eval(self) -> None:
        """Refuse a model whose dropout would change what is measured.

        Raises:
            AdapterError: If the model is in training mode and has dropout.
        """
        for name, module in self.model.named_modules():
            # Attention drops out by a number it holds, not by a module.
            rates = [value for key, value in vars(module).items() if key == "p" or "drop" in key]
            if module.training and any(isinstance(p, float) and p > 0 for p in rates):
                raise AdapterError(
                    f"The model is in training mode and drops out at {name!r}, so its activations "
                    "are random. Call model.eval() first."
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {len(self.sites)} sites)"

    def _repr_html_(self) -> Html:
        rows = []
        for module in dict.fromkeys(site.module for site in self.sites.values()):
            sites = self.select(module)
            widths = sorted({site.width for site in sites})
            rows.append(
                [
                    module,
                    str(len(sites)),
                    ", ".join(f"{width:,}" for width in widths),
                    f"{sum(site.neurons for site in sites):,}",
                    ", ".join(site.name for site in sites if site.inert) or "-",
                ]
            )
        title = (
            f"{type(self).__name__} of {self.name} ({self.model_type}, {self.neuron_kind} outputs)"
        )
        return table(["module", "sites", "width", "neurons", "inert sites"], rows, title)


def require_adapter(given: object) -> None:
    """Refuse what is no adapter, such as the bare model, or arguments in another order.

    Raises:
        AdapterError: If it is none.
    """
    if not isinstance(given, ModelAdapter):
        raise AdapterError(
            f"A {type(given).__name__} was given as the adapter. Give first what "
            "nl.adapt(model, processor) returns."
        )


Family = TypeVar("Family", bound=type[ModelAdapter])
_registry: dict[str, type[ModelAdapter]] = {}


def register(*model_types: str) -> Callable[[Family], Family]:
    """Make a `ModelAdapter` the one for models whose `config.model_type` is one of these."""

    def add(family: Family) -> Family:
        _registry.update(dict.fromkeys(model_types, family))
        return family

    return add


ANY = "*"
"""The model type under which the adapter for models nobody registered is registered."""


def get(model_type: str) -> type[ModelAdapter]:
    """The adapter registered for a model type, here or by an installed package.

    Packages add theirs under the entry point group `neuronlens.adapters`. Where nobody did, it
    is the structural adapter, which establishes what it can.
    """
    if model_type not in _registry:
        for entry in entry_points(group="neuronlens.adapters", name=model_type):
            _registry[model_type] = entry.load()
    return _registry.get(model_type) or _registry[ANY]


def _check_transformers() -> None:
    """Refuse releases of transformers whose models were not looked at."""
    try:
        needed = [Requirement(each) for each in requires("neuronlens-vlm") or ()]
    except PackageNotFoundError:  # used from its source folder, without being installed
        return
    known = next((each for each in needed if each.name == "transformers"), None)
    have = version("transformers")
    if known is not None and not known.specifier.contains(have, prereleases=True):
        raise AdapterError(
            f"transformers {have} is installed, but neuronlens describes the models of "
            f"transformers {known.specifier}; in another release their parts may lie elsewhere. "
            f"Install one of these: pip install 'transformers{known.specifier}'."
        )


def adapt(
    model: nn.Module, processor: Any = None, *, neuron: NeuronKind = "act_fn"
) -> ModelAdapter:
    """Describe a Hugging Face vision-language model so that neuronlens can read it.

    Nothing of the model is changed, and no forward is run; a model on the meta device
    will do.

    Args:
        model: The model, not compiled.
        processor: Its processor, as `AutoProcessor` loads it. Needed to encode samples.
        neuron: What is read as a neuron's activation: `"act_fn"`, the activation function's
            output, as both papers do, or `"down_input"`, what the down projection takes (the
            output times the up projection's; the same where there is no up projection).

    Raises:
        AdapterError: If `model` is no Hugging Face model, the processor is another model's,
            or the installed transformers is outside the supported range.
        UnknownNameError: If there is no such kind of neuron.
        CaptureError: If the model is compiled.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError(
            f"adapt() needs a model object, not {type(model).__name__}. Load it first, for example "
            "with AutoModelForImageTextToText.from_pretrained(...)."
        )
    if hasattr(model, "get_base_model"):
        raise AdapterError(
            f"{type(model).__name__} is a PEFT wrapper. Give neuronlens the model inside it, "
            "model.get_base_model(): its adapters stay active."
        )
    _check_transformers()
    refuse_compiled(model)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not model_type:
        raise AdapterError(
            f"{type(model).__name__} has no config.model_type, so it is not a Hugging Face model. "
            "Pass the model itself, not a wrapper around it."
        )
    return get(model_type)(model, processor, neuron)

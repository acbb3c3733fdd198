"""A chat model of transformers in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from neuronlens.chat.budget import Budget, Held
from neuronlens.chat.model import ChatModel, Reply, again
from neuronlens.chat.replies import Answered, ReplyStore, StoredReply
from neuronlens.chat.request import Message, Request, sendable
from neuronlens.errors import BudgetError, ChatError
from neuronlens.explanation import Failure


class TransformersChat(ChatModel):
    """Any chat model that transformers loads, with or without images, in batches.

    Requests that are sampled together are drawn with one seed: the same calls give the same
    answers, other batches may give others. At temperature 0 batches make no difference.

    Args:
        model: Its language model head generates; used as it is, on the device it is on. Without a
            name for it, its weights must not change afterwards.
        processor: Its processor, or tokenizer if it takes no images, with a chat template.
        name: What keys of stored answers have of the model. By default where it was loaded from,
            with a digest of some of its weights.
        replies: Store of answers, or where it is to lie; None keeps them in memory.
        batch_size: Requests generated together.
        attempts: Replies of the wrong form before a request fails.
        budget: The most requests or tokens.

    Raises:
        ChatError: If the processor has no chat template, or its tokenizer no padding token, or
            the model is in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        name: str | None = None,
        replies: str | Path | ReplyStore | None = None,
        batch_size: int = 8,
        attempts: int = 3,
        budget: Budget | None = None,
    ) -> None:
        config: Any = model.config
        known = name or str(getattr(config, "_name_or_path", "")) or type(model).__name__
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} was given; at least 1 is needed.")
        if any(module.training for module in model.modules()):
            raise ChatError(
                f"{known} is in training mode, in which its answers are random. Call model.eval() "
                "first."
            )
        super().__init__(
            known,
            replies=replies,
            attempts=attempts,
            budget=budget,
            identity=name or f"{known}, {_digest(model)}",
        )
        tokenizer = getattr(processor, "tokenizer", processor)
        if not getattr(processor, "chat_template", None):
            raise ChatError(
                f"The processor of {known} has no chat template, so it cannot be asked. Take an "
                "instruction-tuned model, or set processor.chat_template."
            )
        if tokenizer.pad_token_id is None:
            raise ChatError(
                f"The tokenizer of {known} has no padding token, so prompts cannot share a batch. "
                "Set tokenizer.pad_token, for example to tokenizer.eos_token."
            )
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        self._cancelled = False

    def cancel(self) -> None:
        """Make running calls of `ask` end after the batch they are at."""
        self._cancelled = True

    def ask(self, requests: Iterable[Request]) -> list[Reply | Failure]:
        """Answer every request, in their order; see `ChatModel.ask`."""
        self._cancelled = False
        answers: dict[int, Reply | Failure] = {}
        twins: dict[str, list[int]] = {}
        lost: dict[str, Failure] = {}
        batches: dict[tuple[float, int], list[_Waiting]] = {}
        for number, request in enumerate(requests):
            key = request.key(self.identity)
            stored = lost.get(key) or self._stored(request, key)
            if stored is not None:
                answers[number] = stored
            elif key in twins:
                twins[key].append(number)
            else:
                twins[key] = [number]
                # A batch is sampled with one temperature and seed.
                waiting = batches.setdefault((request.temperature, request.draw), [])
                waiting.append(_Waiting(request, key))
                if len(waiting) == self.batch_size:
                    answers |= self._answered(waiting, twins, lost)
                    waiting.clear()
        for waiting in batches.values():
            answers |= self._answered(waiting, twins, lost)
        return [answers[i] for i in range(len(answers))]

    def _answered(
        self,
        waiting: Sequence[_Waiting],
        twins: dict[str, list[int]],
        lost: dict[str, Failure],
    ) -> dict[int, Reply | Failure]:
        """Ask until every reply of a batch is an answer, or its attempts are used up."""
        done: dict[str, Reply | Failure] = {}
        left = list(waiting)
        for attempt in range(1, self.attempts + 1):
            if not left:
                break
            if self._cancelled:
                raise ChatError("Asking was stopped. What was answered is stored.")
            failed = []
            for each, reply in zip(left, self._generated(left, attempt), strict=True):
                words = self._words(each.messages)
                judged = self._judge(each.request, each.key, reply, words)
                if isinstance(judged, Reply):
                    answered = Answered(each.key, each.request, self.identity, reply, words)
                    self.replies.put([answered])
                    done[each.key] = judged
                    continue
                why = f"no valid reply after {self.attempts} attempts: {judged}"
                done[each.key] = Failure(why, asked=each.key)
                each.messages = again(each.request.messages, reply.text, judged)
                if reply.cut_short:
                    each.max_tokens *= 2
                failed.append(each)
            left = failed
        lost |= {key: said for key, said in done.items() if isinstance(said, Failure)}
        return {number: done[each.key] for each in waiting for number in twins.pop(each.key)}

    def _generated(self, asked: Sequence[_Waiting], attempt: int) -> list[StoredReply]:
        inputs = self._inputs(asked)
        lengths = inputs["attention_mask"].sum(1).tolist()
        held = self._hold([(row, a.max_tokens) for row, a in zip(lengths, asked, strict=True)])
        try:
            rows = self._rows(inputs, asked)
        except BaseException:
            for each in held:
                self.purse.give_back(each)
            raise
        replies = []
        for row, one, prompt, its in zip(rows, asked, lengths, held, strict=True):
            # The batch was as long as its longest; an answer alone would have ended here.
            row = row[: one.max_tokens]
            written = int((row != self._tokenizer.pad_token_id).sum())
            self.purse.settle(its, prompt, written)
            replies.append(
                StoredReply(
                    text=sendable(str(self._tokenizer.decode(row, skip_special_tokens=True))),
                    model=self.name,
                    attempts=attempt,
                    prompt_tokens=prompt,
                    completion_tokens=written,
                    cut_short=written >= one.max_tokens,
                )
            )
        return replies

    def _inputs(self, asked: Sequence[_Waiting]) -> Any:
        from jinja2 import TemplateError

        try:
            return self.processor.apply_chat_template(
                [[self._turn(message) for message in each.messages] for each in asked],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **self._padding(),
            )
        except TemplateError as error:
            raise ChatError(
                f"The chat template of {self.name} refuses the conversation: {error}. Take another "
                "model, or set a template that knows system, user and assistant in turn."
            ) from error

    @torch.inference_mode()
    def _rows(self, inputs: Any, asked: Sequence[_Waiting]) -> Int[Tensor, "row token"]:
        """What is written after each prompt, padded at the end."""
        model: Any = self.model
        draw, temperature = asked[0].request.draw, asked[0].request.temperature
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        moved = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
            for name, value in inputs.items()
        }
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(draw)
            whole: Tensor = model.generate(
                **moved,
                max_new_tokens=max(each.max_tokens for each in asked),
                pad_token_id=self._tokenizer.pad_token_id,
                **sampling,
            )
        return whole[:, inputs["input_ids"].shape[1] :].cpu()

    def _hold(self, batch: Sequence[tuple[int, int]]) -> list[Held]:
        """Set aside what a batch may cost, all of it or nothing."""
        held: list[Held] = []
        try:
            for prompt, completion in batch:
                held.append(self.purse.hold(prompt, completion))
        except BudgetError:
            for each in held:
                self.purse.give_back(each)
            raise
        return held

    def _padding(self) -> dict[str, Any]:
        """Padding on the left, where generation wants it, whatever the tokenizer's own side."""
        if self.processor is self._tokenizer:
            return {"padding": True, "tokenizer_kwargs": {"padding_side": "left"}}
        return {"processor_kwargs": {"padding": True, "padding_side": "left"}}

    def _turn(self, message: Message) -> dict[str, Any]:
        if self.processor is self._tokenizer:
            if message.pictures:
                raise ChatError(
                    f"{self.name} was given a picture, and takes text only. Give a model with a "
                    "processor, or explain text neurons only."
                )
            return {"role": message.role, "content": message.text}
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": part.open()}
            for part in message.parts
        ]
        return {"role": message.role, "content": parts}


def _digest(model: nn.Module) -> str:
    """What tells checkpoints of one architecture apart: 64 values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:  # offloaded: only its shape is at hand
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)][:64]
            digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Waiting:
    """A request that has no answer yet, and the conversation about it."""

    def __init__(self, request: Request, key: str) -> None:
        self.request = request
        self.key = key
        self.messages = request.messages
        self.max_tokens = request.max_tokens

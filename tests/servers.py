"""Chat endpoints for tests, over real HTTP: a scripted one, and `transformers serve`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PROGRAM = Path(__file__).parent / "programs" / "chat_server.py"

START_SECONDS = 120
"""What has not started after this time never will."""

SIDE, PATCH = 32, 8
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")

CHAT_TEMPLATE = """\
<bos>{% for message in messages %}{{ message['role'] }}: \
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}\
{% endif %}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""


# The scripted server.


@dataclass(frozen=True)
class ChatServer:
    """A running `chat_server.py`.

    Attributes:
        base_url: What a client is given, with `/v1`.
        log: The file with one line per event.
    """

    base_url: str
    log: Path
    process: subprocess.Popen[str]

    def stats(self) -> dict[str, Any]:
        """Requests, in flight, most in flight at once, and how many ended in which status."""
        with urllib.request.urlopen(self.base_url.removesuffix("v1") + "stats") as answer:
            stats: dict[str, Any] = json.load(answer)
        return stats

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The log: "received", and "answered", "dropped" or "abandoned" by the client."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if name in (None, line["event"])]

    def repeated(self) -> dict[str, int]:
        """How often each body was received that was received more than once."""
        seen = Counter(line["sha256"] for line in self.events("received"))
        return {digest: count for digest, count in seen.items() if count > 1}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def chat_server(
    folder: Path,
    *,
    latency: float = 0,
    script: Sequence[Any] | None = None,
    keep_bodies: bool = False,
    port: int = 0,
) -> Iterator[ChatServer]:
    """A scripted chat server, which ends with the block, or with this process.

    Args:
        folder: Where its script and log go. A second server in one folder goes on with the log.
        latency: Seconds before each answer.
        script: The steps; see `programs/chat_server.py`.
        keep_bodies: Whether the log has what was asked in full.
        port: Where it listens; 0 takes a free one.
    """
    log, steps = folder / "chat.jsonl", folder / "script.json"
    log.touch()
    steps.write_text(json.dumps(script or []))
    command = [sys.executable, str(PROGRAM), "--with-parent", f"--port={port}"]
    command += [f"--latency={latency}", f"--log={log}", f"--script={steps}"]
    with subprocess.Popen(
        command + ["--keep-bodies"] * keep_bodies,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            # The line comes, or the process has ended and the pipe is at its end.
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"The chat server did not start: {process.stderr.read()}")
            yield ChatServer(f"http://127.0.0.1:{int(line)}/v1", log, process)
        finally:
            process.kill()


# The real server, and a model that is small enough for it.


def tiny_chat_vlm(folder: Path, *, seed: int = 0) -> Path:
    """Save a LLaVA with random weights that can chat in bytes, images included.

    It loads with `AutoProcessor` and `AutoModelForImageTextToText`. What it says is noise.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate((*SPECIAL, *letters))}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **small, num_hidden_layers=2, image_size=SIDE, patch_size=PATCH
        ),
        text_config=LlamaConfig(
            **small,
            num_hidden_layers=2,
            num_key_value_heads=4,
            vocab_size=len(words),
            max_position_embeddings=8192,
            pad_token_id=words["<pad>"],
            bos_token_id=words["<bos>"],
            eos_token_id=words["<eos>"],
        ),
        image_token_index=words["<image>"],
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = words["<pad>"]
    model.generation_config.eos_token_id = words["<eos>"]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class ServedModel:
    """A model behind `transformers serve`.

    Attributes:
        base_url: What a client is given, with `/v1`.
        model: The name it answers to, which is its folder.
        log: What the server wrote.
    """

    base_url: str
    model: str
    log: Path


@contextmanager
def transformers_serve(folder: Path) -> Iterator[ServedModel]:
    """`transformers serve` on a model's folder, on the CPU, which ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "serve.log"
        hub = Path(home) / "hub"
        hub.mkdir()
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "OMP_NUM_THREADS": "1"}
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
        command += ["--device=cpu", "--dtype=float32", "--host=127.0.0.1", f"--port={port}"]
        with (
            log.open("w") as sink,
            subprocess.Popen(
                command, env=os.environ | quiet, stdout=sink, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                _wait_for(f"http://127.0.0.1:{port}/health", process, log)
                yield ServedModel(f"http://127.0.0.1:{port}/v1", str(folder), log)
            finally:
                process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    last = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < last:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"`transformers serve` did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def served_vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The tiny model behind the real server; for tests marked `xdist_group("serve")`."""
    with transformers_serve(tiny_chat_vlm(tmp_path_factory.mktemp("served"))) as served:
        yield served

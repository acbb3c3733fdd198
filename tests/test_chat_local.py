"""Chat models of transformers: in this process, and behind the server that transformers has."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)

from neuronlens.chat import (
    Budget,
    Message,
    OpenAIChat,
    Picture,
    Reply,
    ReplyStore,
    Request,
    TransformersChat,
    instruction,
)
from neuronlens.errors import BudgetError, ChatError
from neuronlens.explanation import Failure
from servers import served_vlm, tiny_chat_vlm  # noqa: F401


class Guess(BaseModel):
    sentence: str


def ask(text="What is it?", *pictures, **more) -> Request:
    system = Message("system", ("Be brief.",))
    return Request((system, Message("user", (*pictures, text))), **{"max_tokens": 12} | more)


def picture(colour="red") -> Picture:
    return Picture.of(Image.new("RGB", (32, 32), colour))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_vlm(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def chat(model, processor) -> TransformersChat:
    return TransformersChat(model, processor, name="tiny")


@pytest.fixture
def tokenizer(processor):
    """The tokenizer alone, with a template for texts."""
    alone = processor.tokenizer
    alone.chat_template = processor.chat_template
    return alone


@pytest.fixture
def text_model(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).eval()


@pytest.fixture
def reciter(tokenizer):
    """Make a chat of a model that writes these tokens and ends, whatever it is asked.

    The layers add nothing, and the head looks up what comes after the last token. A prompt ends
    with a space.
    """

    def make(*said: str, **more) -> TransformersChat:
        tokenizer.add_tokens(list(said))
        (space,) = tokenizer(" ", add_special_tokens=False).input_ids
        path = [space, *map(tokenizer.convert_tokens_to_ids, said), tokenizer.eos_token_id]
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=512,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), 512))
            model.lm_head.weight.zero_()
            model.lm_head.weight[path[1:], path[:-1]] = 1.0
        return TransformersChat(model, tokenizer, name="reciter", **more)

    return make


def texts(answers) -> list[str]:
    assert all(isinstance(answer, Reply) for answer in answers)
    return [answer.text for answer in answers]


MIXED = [
    ask("What?"),
    ask("What is in this picture, and why would anyone ask?", picture()),
    ask("Which?", picture("blue"), picture("green")),
    ask("Short.", max_tokens=3),
    ask("Long. " * 20),
]


def test_requests_of_different_lengths_get_the_same_answers_together_as_alone(model, processor):
    alone = [TransformersChat(model, processor, name="t").ask([each])[0] for each in MIXED]
    for size in (2, 5):
        chat = TransformersChat(model, processor, name="t", batch_size=size)
        answers = chat.ask(iter(MIXED))
        assert texts(answers) == texts(alone)
        assert [a.key for a in answers] == [each.key("t") for each in MIXED]
        assert chat.purse.requests == len(MIXED)
        assert chat.purse.completion_tokens <= 3 + 4 * 12
    assert len(set(texts(alone))) == len(MIXED)


def test_an_answer_is_what_the_model_generates_from_the_template(model, processor, chat):
    request = ask("What is it?", picture())
    words = "system: Be brief.\nuser: <image>What is it?\nassistant: "
    inputs = processor(
        text="<bos>" + words, images=request.messages[1].pictures[0].open(), return_tensors="pt"
    )
    assert inputs["input_ids"][0, :2].tolist() != 2 * [processor.tokenizer.bos_token_id]
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = written[0, inputs["input_ids"].shape[1] :]
    (answer,) = chat.ask([request])
    assert answer.text == processor.tokenizer.decode(new, skip_special_tokens=True)
    assert chat.purse.prompt_tokens == inputs["input_ids"].shape[1]


def test_another_picture_gives_another_answer(chat):
    noise = Image.effect_noise((32, 32), 100).convert("RGB")
    shown = [picture("black"), picture("white"), Picture.of(noise)]
    said = texts(chat.ask(ask("What is it?", each, max_tokens=30) for each in shown))
    assert len(set(said)) > 1
    assert texts(chat.ask([ask("What is it?", shown[0], max_tokens=30)])) == said[:1]


def test_a_model_in_half_precision_takes_pictures(folder, processor):
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    (answer,) = TransformersChat(half, processor, name="half").ask([ask("What?", picture())])
    assert answer.text


def test_a_model_of_texts_needs_no_more_than_a_tokenizer(text_model, tokenizer):
    tokenizer.padding_side = "right"
    chat = TransformersChat(text_model, tokenizer, name="text", batch_size=3)
    asked = [ask("a"), ask("b " * 20), ask("c")]
    together = texts(chat.ask(asked))
    alone = [TransformersChat(text_model, tokenizer, name="text").ask([each])[0] for each in asked]
    assert together == texts(alone)
    assert tokenizer.padding_side == "right"


def test_the_padding_side_of_a_processor_is_left_as_it_was(model, processor):
    processor.tokenizer.padding_side = "right"
    answers = TransformersChat(model, processor, name="t").ask(MIXED)
    alone = [TransformersChat(model, processor, name="t").ask([each])[0] for each in MIXED]
    assert texts(answers) == texts(alone)
    assert processor.tokenizer.padding_side == "right"


def test_a_picture_for_a_model_of_texts_is_an_error(text_model, tokenizer):
    chat = TransformersChat(text_model, tokenizer, name="text")
    with pytest.raises(ChatError, match="text was given a picture"):
        chat.ask([ask("What?", picture())])


def test_what_cannot_chat_is_refused_when_it_is_given(model, processor):
    processor.chat_template = None
    with pytest.raises(ChatError, match="tiny has no chat template"):
        TransformersChat(model, processor, name="tiny")
    processor.chat_template = "{{ messages }}"
    processor.tokenizer.pad_token = None
    with pytest.raises(ChatError, match="no padding token"):
        TransformersChat(model, processor, name="tiny")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    TransformersChat(model, processor, name="tiny")
    with pytest.raises(ValueError, match="batch_size=0"):
        TransformersChat(model, processor, batch_size=0)


def test_a_model_in_training_mode_is_refused(text_model, tokenizer):
    text_model.model.layers[0].train()
    with pytest.raises(ChatError, match=r"training mode.*model\.eval"):
        TransformersChat(text_model, tokenizer)
    text_model.eval()
    assert TransformersChat(text_model, tokenizer).ask([ask()])


def test_a_template_that_refuses_the_conversation_is_an_error_that_says_so(model, processor):
    processor.chat_template = "{{ raise_exception('System role not supported') }}"
    chat = TransformersChat(model, processor, name="tiny")
    with pytest.raises(ChatError, match=r"tiny refuses.*System role not supported"):
        chat.ask([ask()])
    assert chat.purse._held_requests == 0


def test_the_name_is_where_the_model_came_from(model, processor, folder, text_model, tokenizer):
    assert TransformersChat(model, processor).name == str(folder)
    assert TransformersChat(text_model, tokenizer).name == "LlamaForCausalLM"


def test_answers_of_one_checkpoint_are_not_those_of_another_of_the_same_class(
    text_model, tokenizer
):
    replies = ReplyStore()
    first = TransformersChat(text_model, tokenizer, replies=replies)
    first.ask([ask()])
    assert TransformersChat(text_model, tokenizer, replies=replies).ask([ask()])[0].stored
    with torch.no_grad():
        text_model.lm_head.weight.mul_(-1)
    other = TransformersChat(text_model, tokenizer, replies=replies)
    assert other.name == first.name
    assert not other.ask([ask()])[0].stored
    named = TransformersChat(text_model, tokenizer, name="t", replies=replies)
    assert named.ask([ask()])[0].key == ask().key("t")


def test_later_twins_of_a_request_that_failed_are_not_asked_again_in_the_same_call(
    text_model, tokenizer
):
    chat = TransformersChat(text_model, tokenizer, name="t", attempts=1, batch_size=1)
    answers = chat.ask([ask("bad", answer=Guess), ask("good"), ask("bad", answer=Guess)])
    assert [type(answer) for answer in answers] == [Failure, Reply, Failure]
    assert chat.purse.requests == 2


def test_stored_answers_and_twins_are_not_generated_again(chat, tmp_path):
    chat.keep_in(tmp_path / "replies.sqlite")
    asked = [ask(f"{n % 3}") for n in range(30)]
    answers = chat.ask(asked)
    assert texts(answers) == texts(answers[:3]) * 10
    assert chat.purse.requests == 3
    again = chat.ask(asked)
    assert all(answer.stored for answer in again)
    assert texts(again) == texts(answers)
    chat.replies.close()
    chat.keep_in(tmp_path / "replies.sqlite")
    assert texts(chat.ask(asked)) == texts(answers)
    assert chat.purse.requests == 3
    chat.replies.close()


def test_replies_of_the_wrong_form_are_asked_again_and_then_a_failure(model, processor):
    chat = TransformersChat(model, processor, name="t", attempts=2, batch_size=2)
    asked = [ask(f"{n % 2}", answer=Guess) for n in range(6)]
    answers = chat.ask([*asked, ask("text")])
    assert [type(answer) for answer in answers] == 6 * [Failure] + [Reply]
    assert "no valid reply after 2 attempts: no JSON object" in answers[0].reason
    assert chat.replies.usage().invalid == chat.purse.requests - 1
    assert len(chat.replies) == 1


def test_an_answer_of_the_right_form_is_read(reciter):
    chat = reciter('{"sentence":"a dog"}')
    answers = chat.ask([ask("What?", answer=Guess), ask("Who? " * 9, answer=Guess)])
    assert [answer.value for answer in answers] == 2 * [Guess(sentence="a dog")]
    assert texts(answers) == 2 * ['{"sentence":"a dog"}']
    assert chat.purse.completion_tokens == 4  # the object, and the end


def test_an_answer_that_was_cut_short_may_be_longer_the_next_time(reciter):
    chat = reciter('{"sentence":', '"a dog"', "}")
    (answer,) = chat.ask([ask("What?", answer=Guess, max_tokens=2)])
    assert answer.value == Guess(sentence="a dog")
    assert chat.replies.get(answer.key).attempts == 2


def test_sampled_answers_come_again_with_the_draw_and_differ_without(model, processor):
    def drawn(draw, **more):
        chat = TransformersChat(model, processor, name="t")
        return texts(chat.ask(ask(f"{n}", temperature=1.5, draw=draw, **more) for n in range(3)))

    before = torch.random.get_rng_state()
    first = drawn(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)
    assert drawn(1) == first
    assert drawn(2) != first


def test_a_budget_stops_before_a_batch_and_keeps_what_was_answered(model, processor):
    chat = TransformersChat(model, processor, batch_size=4, budget=Budget(requests=10), name="t")
    with pytest.raises(BudgetError, match="requests"):
        chat.ask(ask(f"{n}") for n in range(20))
    assert len(chat.replies) == chat.purse.requests == 8
    assert chat.purse._held_requests == 0


def test_a_failing_model_leaves_nothing_set_aside(text_model, tokenizer):
    chat = TransformersChat(text_model, tokenizer, name="text", budget=Budget(requests=1))
    text_model.forward = None
    with pytest.raises(TypeError):
        chat.ask([ask()])
    del text_model.forward
    assert len(chat.ask([ask()])) == 1


def test_cancelling_ends_the_call_after_its_batch(model, processor):
    chat = TransformersChat(model, processor, batch_size=1, name="t")

    def asked():
        for n in range(10_000):
            if n == 3:
                chat.cancel()
            yield ask(f"{n}")

    with pytest.raises(ChatError, match="stopped"):
        chat.ask(asked())
    assert len(chat.replies) == 3
    assert len(chat.ask([ask("later")])) == 1


# Behind the server that transformers has.


@pytest.mark.xdist_group("serve")
def test_the_real_server_answers_texts_and_pictures(served_vlm):  # noqa: F811
    chat = OpenAIChat(served_vlm.model, base_url=served_vlm.base_url, concurrency=2)
    asked = [ask("What?"), ask("What is it?", picture()), ask("What is it?", picture("blue"))]
    answers = chat.ask(asked)
    assert all(texts(answers))
    assert chat.purse.requests == 3
    assert chat.purse.prompt_tokens > 3 * 30
    assert all(answer.stored for answer in chat.ask(asked))


@pytest.mark.xdist_group("serve")
def test_the_real_server_ignores_the_form_and_the_failure_says_what_it_wrote(served_vlm):  # noqa: F811
    chat = OpenAIChat(
        served_vlm.model, base_url=served_vlm.base_url, attempts=2, slowest_retry=0.2, retries=1
    )
    (failed,) = chat.ask([ask(instruction(Guess), answer=Guess)])
    assert isinstance(failed, Failure)
    assert failed.reason.startswith("no valid reply after 2 attempts: no JSON object in the reply")
    assert "refused" not in failed.reason
    assert chat.replies.usage().invalid == 2
    assert len(chat.replies) == 0


@pytest.mark.xdist_group("serve")
def test_the_real_server_does_not_know_another_model(served_vlm):  # noqa: F811
    chat = OpenAIChat("/no/such/model", base_url=served_vlm.base_url, retries=0, slowest_retry=0.2)
    (failed,) = chat.ask([ask()])
    assert isinstance(failed, Failure)
    assert "400" in failed.reason
    assert "/no/such/model" in failed.reason

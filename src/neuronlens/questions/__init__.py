"""Questions with references: how they are read, and how they are put to a model."""

from neuronlens.questions.layouts.ours import QuestionRow
from neuronlens.questions.prompt import DRIVING_ROLE, PROMPTS, Prompt, as_prompt
from neuronlens.questions.question import Question
from neuronlens.questions.read import LayoutName, read_questions

__all__ = [
    "DRIVING_ROLE",
    "PROMPTS",
    "LayoutName",
    "Prompt",
    "Question",
    "QuestionRow",
    "as_prompt",
    "read_questions",
]

"""Questions, summaries and translations to try a model with: what is asked, and some examples."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Example:
    """What a task is given, and an answer that would do."""

    given: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """How it is asked; `{}` stands for what is given."""

    prompt: str
    examples: tuple[Example, ...]

    def ask(self, given: str) -> str:
        """The prompt for a text."""
        return self.prompt.replace("{}", given.strip())

    def example(self, number: int) -> Example:
        """Counted from 1. Raises SettingsError."""
        if not 1 <= number <= len(self.examples):
            raise SettingsError(
                f"--example is {number}; this task has examples 1 to {len(self.examples)}"
            )
        return self.examples[number - 1]


TASKS = {
    "qa": Task(
        "Answer the question with the help of the text.\n\n{}\nAnswer:",
        (
            Example(
                "Text: The bridge over the Aller was built in 1907 and is 84 meters long. Before, "
                "a ferry crossed the river twice an hour.\nQuestion: When was the bridge built?",
                "In 1907.",
            ),
            Example(
                "Text: Honey bees tell each other with a dance where flowers are. The longer it "
                "lasts, the farther the way.\nQuestion: How do bees say where flowers are?",
                "With a dance.",
            ),
            Example(
                "Text: Mira keeps three goats and a donkey behind the mill. The donkey is older "
                "than all the goats together.\nQuestion: How many goats does Mira keep?",
                "Three.",
            ),
            Example(
                "Text: The library opens at nine on weekdays and at eleven on Saturdays; on "
                "Sundays it is closed.\nQuestion: When does the library open on Saturdays?",
                "At eleven.",
            ),
            Example(
                "Text: Copper turns green in the rain because a thin layer forms on it, which "
                "keeps the metal below from harm.\nQuestion: Why does copper turn green?",
                "Because a thin layer forms on it.",
            ),
        ),
    ),
    "summarize": Task(
        "Summarize the text in one sentence.\n\nText: {}\nSummary:",
        (
            Example(
                "The council met on Tuesday to talk about the old harbor. Some wanted to sell it, "
                "others to make a park of it. After four hours they voted for the park, with nine "
                "votes to five. Work will begin in spring.",
                "The council voted to make a park of the old harbor, beginning in spring.",
            ),
            Example(
                "A storm crossed the valley last night. It tore roofs off two barns and felled "
                "some thirty trees, one of them onto the railway. Nobody was hurt. Trains have "
                "been running again since noon.",
                "A storm damaged barns and trees in the valley, but hurt nobody.",
            ),
            Example(
                "Researchers watched crows for two years. The birds remembered who had once caught "
                "them, warned others of these people, and went on doing so long afterwards, even "
                "birds that had not been there.",
                "Crows remember people who caught them and warn others.",
            ),
            Example(
                "The bakery on Mill Street has changed hands. Its new owner bakes at night with a "
                "wood oven that her grandfather built, and sells out by ten in the morning. She is "
                "looking for a second baker.",
                "The new owner of the bakery sells out every morning and needs a second baker.",
            ),
            Example(
                "Batteries of the new bus last for three hundred kilometers. In winter, when the "
                "heating runs, it is two hundred. The city has ordered twelve of them and will see "
                "in a year whether to order more.",
                "The city tries twelve electric buses for a year.",
            ),
        ),
    ),
    "translate": Task(
        "Translate from English to German.\n\nEnglish: {}\nGerman:",
        (
            Example("The house stands by the river.", "Das Haus steht am Fluss."),
            Example("Where is the nearest station?", "Wo ist der nächste Bahnhof?"),
            Example(
                "We have bread, but no butter.", "Wir haben Brot, aber keine Butter."
            ),
            Example(
                "Tomorrow it will rain in the north.", "Morgen wird es im Norden regnen."
            ),
            Example(
                "She reads a book about old ships.", "Sie liest ein Buch über alte Schiffe."
            ),
        ),
    ),
}  # fmt: skip

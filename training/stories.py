"""Write little English stories from a seeded grammar: the corpus of the demo text model.

A story is a plot (a function below) told about a cast drawn at random. Sentences are templates:
`[a|b]` picks one of the alternatives, `{hero}` fills in the cast. The same seed always gives the
same stories, whatever the platform. About 550 distinct words, so that a vocabulary of 1,024
byte pairs makes nearly every word one token. Names, animals, things and places stay the same
within a story, so that a model that attends to its context is rewarded for it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

NAMES = (
    "Mia Leo Anna Tom Lily Max Ruby Sam Ella Ben Nora Finn Zoe Jack Ivy Oscar Lucy Theo Rosa "
    "Hugo Clara Milo Alice Felix Emma Otto Daisy Noah Luna Toby Grace Henry Maya Peter Sophie "
    "Oliver"
).split()
GIRLS = set(NAMES[0::2])
ANIMALS = (
    "fox rabbit bear mouse cat dog duck frog owl squirrel hedgehog deer goat lamb pony turtle "
    "badger beaver otter sparrow"
).split()
MOODS = ("little small young brave kind clever shy curious happy gentle funny quiet").split()
COLORS = ["red", "blue", "green", "yellow", "white", "golden", "silver", "purple", "brown", "pink"]
THINGS = (
    "ball kite hat scarf bell key lamp drum basket boat book cup bucket blanket mirror ring "
    "whistle lantern wagon flute"
).split()
FOODS = ("apple pie soup bread honey cake cheese berries carrots nuts cookies pancakes").split()
PLACES = (
    "forest garden meadow village hill river lake farm beach valley field park mountain island"
).split()
HOMES = ["house", "cottage", "den", "nest", "barn", "cabin"]
WEATHERS = ["sunny", "rainy", "windy", "cold", "warm", "snowy", "cloudy", "foggy"]
FEELINGS = ["proud", "glad", "happy", "thankful", "calm"]
SORROWS = ["sad", "worried", "afraid", "lonely", "upset"]
PARTS = ["foot", "leg", "arm", "head", "back"]

ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Being:
    """Someone in a story: a name, an animal and the pronouns that go with them."""

    name: str
    animal: str
    mood: str

    @property
    def they(self) -> str:
        return "she" if self.name in GIRLS else "he"

    @property
    def them(self) -> str:
        return "her" if self.name in GIRLS else "him"

    @property
    def their(self) -> str:
        return "her" if self.name in GIRLS else "his"


class Teller:
    """Draws a cast and fills sentence templates with it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        hero_name, friend_name, third_name = rng.sample(NAMES, 3)
        hero_animal, friend_animal, third_animal = rng.sample(ANIMALS, 3)
        hero = Being(hero_name, hero_animal, rng.choice(MOODS))
        friend = Being(friend_name, friend_animal, rng.choice(MOODS))
        thing, other_thing = rng.sample(THINGS, 2)
        place, far_place = rng.sample(PLACES, 2)
        self.words = {
            "hero": hero.name, "animal": hero.animal, "mood": hero.mood,
            "he": hero.they, "him": hero.them, "his": hero.their,
            "friend": friend.name, "fanimal": friend.animal, "fmood": friend.mood,
            "fhe": friend.they, "fhim": friend.them, "fhis": friend.their,
            "third": third_name, "tanimal": third_animal,
            "thing": thing, "color": rng.choice(COLORS), "other": other_thing,
            "food": rng.choice(FOODS), "place": place, "far": far_place,
            "home": rng.choice(HOMES), "weather": rng.choice(WEATHERS),
            "feeling": rng.choice(FEELINGS), "sorrow": rng.choice(SORROWS),
            "part": rng.choice(PARTS),
            "number": rng.choice(["two", "three", "four", "five", "six", "seven"]),
        }  # fmt: skip

    def say(self, template: str) -> str:
        """One sentence (or a few): alternatives picked, cast filled in, first letter raised."""
        while ALTERNATIVES.search(template):
            template = ALTERNATIVES.sub(
                lambda match: self.rng.choice(match.group(1).split("|")), template
            )
        words = self.words | {"He": self.words["he"].capitalize()}
        words |= {"His": words["his"].capitalize(), "FHe": words["fhe"].capitalize()}
        words["FHis"] = words["fhis"].capitalize()
        text = with_right_article(template.format(**words))
        return text[0].upper() + text[1:]


def with_right_article(text: str) -> str:
    """`a owl` becomes `an owl`."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def opening(teller: Teller) -> str:
    return teller.say(
        teller.rng.choice(
            (
                "Once upon a time, there was a {mood} {animal} named {hero}.",
                "Once upon a time, a {mood} {animal} named {hero} lived in a [small|cozy|old] "
                "{home} [by|near] the {place}.",
                "There once was a {mood} {animal} named {hero} who [loved|liked] the {place}.",
                "{hero} was a {mood} {animal} who lived [near|by] the {place}.",
                "In a [small|cozy|old] {home} [by|near] the {place} lived a {mood} {animal} "
                "named {hero}.",
                "One {weather} [day|morning], a {mood} {animal} named {hero} went to the {place}.",
                "Long ago, [near|by] a [wide|quiet|green] {place}, there lived a {mood} {animal} "
                "named {hero}.",
            )
        )
    )


def habit(teller: Teller) -> str:
    return teller.say(
        teller.rng.choice(
            (
                "{He} loved to [sing|dance|play|run|paint|read] [in the sun|all day long|"
                "every morning|after lunch].",
                "Every [day|morning|evening], {hero} ate [some|a bit of|warm] {food} "
                "and [looked at the sky|sang a song|told a story].",
                "{His} favorite thing was a {color} {thing}.",
                "{He} was [never|seldom] [bored|alone|in a hurry].",
                "Everyone in the {place} knew {him} well.",
            )
        )
    )


def ending(teller: Teller) -> str:
    return teller.say(
        teller.rng.choice(
            (
                "From that day on, {hero} and {friend} were [best|good|the best of] friends.",
                "{hero} was very {feeling}, and so was {friend}.",
                "That night, {hero} [slept|went to sleep] with a [big|warm|happy] smile.",
                "And they all lived happily in the {place}.",
                "{hero} learned that [it is good to share|friends help each other|being kind "
                "is better than being fast|asking for help is brave|telling the truth is best].",
                "They [laughed|sang|danced] until the [sun went down|stars came out|moon was high].",
            )
        )
    )


def lost_and_found(t: Teller) -> Iterator[str]:
    yield "{hero} had a {color} {thing} that {he} [loved|liked] very much."
    yield "One {weather} [day|morning], the {thing} was gone. {hero} [felt|was] very {sorrow}."
    yield (
        '"[Where is|Have you seen] my {color} {thing}?" {hero} asked a {fanimal} named {friend}. '
        '"[No|I am sorry], but I will help you look," said {friend}.'
    )
    yield "They looked [under the bed|behind the door|in the {home}], but it was not there."
    yield "They looked [under a tree|behind a rock|in the tall grass], but it was not there."
    yield (
        "[Then|At last|Suddenly], {friend} saw something {color} in the {far}. It was the {thing}!"
    )
    yield '"Thank you, {friend}," said {hero}. "You are a [good|true|great] friend."'


def storm(t: Teller) -> Iterator[str]:
    yield "One [day|night|evening], a [big|terrible|loud] storm came to the {place}."
    yield "The wind [blew|howled] and the rain [fell|came down] on the {home}. {hero} was {sorrow}."
    yield (
        "[Then|Suddenly], there was a knock at the door. It was {friend} the {fanimal}, "
        "who was [wet|cold|all wet]."
    )
    yield '"May I come in?" asked {friend}. "Of course," said {hero}. "Come and sit by the fire."'
    yield "{hero} gave {fhim} a [warm|soft|dry] blanket and [some|a bowl of|a little] {food}."
    yield "They [told stories|sang songs|played games] until the storm was over."
    yield (
        "In the morning, the sun [was shining|came out], and they saw a [beautiful|big|bright] "
        "rainbow over the {far}."
    )


def sharing(t: Teller) -> Iterator[str]:
    yield "One day, {hero} [made|baked|found] a [big|large|huge] basket of {food}."
    yield '"[I will keep it all|This is all mine|I will not share]," {he} [said|thought].'
    yield "A {fmood} {fanimal} named {friend} came by. {FHe} was very hungry."
    yield '"[May|Can] I have some {food}, please?" asked {friend}. "No," said {hero}.'
    yield "{friend} [went away|walked away], and {hero} ate [alone|all alone]. But {he} felt {sorrow}."
    yield (
        "So {hero} ran [to the {far}|after {fhim}] and said, "
        '"I am sorry, {friend}. Let us eat the {food} together."'
    )
    yield "They sat [in the {place}|under a tree|by the {far}] and shared the {food}."
    yield "It tasted [much|so much] better [with a friend|when it was shared]."


def journey(t: Teller) -> Iterator[str]:
    yield "{hero} wanted to see the {far}, but it was [far away|very far|a long way]."
    yield "{He} packed a {color} {thing} and some {food}, and [set off|started to walk]."
    yield 'On the way, {he} met {friend}, a {fmood} {fanimal}. "Where are you going?" asked {friend}.'
    yield '"I am going to the {far}," said {hero}. "[May|Can] I come with you?" asked {friend}.'
    yield "They walked for {number} days, over [hills|bridges|stones] and through the {place}."
    yield "When {friend} was [tired|hungry], {hero} gave {fhim} some {food}."
    yield "When {hero} was [scared|afraid], {friend} held {his} hand."
    yield (
        "[At last|In the end], they came to the {far}. It was [beautiful|wonderful|"
        "even better than they had hoped]."
    )


def learning(t: Teller) -> Iterator[str]:
    yield "{hero} wanted to learn to [swim|fly a kite|play the flute|ride a bike|climb a tree]."
    yield "{He} tried [once|one time], and {he} [fell|failed]. {He} tried again, and {he} fell again."
    yield '"I [can not|will never] do it," said {hero}. {He} felt {sorrow}.'
    yield "{friend}, an old {fanimal}, [sat down|stopped] next to {him}."
    yield (
        '"I fell {number} times when I was young," said {friend}. '
        '"[Try again|Do it slowly|Do not give up], and I will [stay with you|help you]."'
    )
    yield "{hero} took a deep breath and tried [again|once more]. [This time|Slowly], it worked!"
    yield '"I did it! I did it!" {he} [shouted|cried|called]. {friend} [smiled|laughed|clapped].'


def broken(t: Teller) -> Iterator[str]:
    yield "{friend} the {fanimal} had a {color} {thing}. It was [new|very old|very pretty]."
    yield "One {weather} day, {hero} played with the {thing}, and it [fell down and broke|broke]."
    yield "{hero} was {sorrow}. {He} hid the {thing} [under the bed|behind a tree|in a box]."
    yield '"Have you seen my {color} {thing}?" asked {friend}. {hero} looked at the ground.'
    yield '"I broke it," {he} said [softly|at last]. "I am very sorry, {friend}."'
    yield '{friend} was quiet. Then {fhe} said, "Thank you for telling [me|me the truth]."'
    yield "Together they [fixed|mended|glued] the {thing}, and it was [as good as new|even prettier]."


def rescue(t: Teller) -> Iterator[str]:
    yield 'One {weather} day, {hero} heard a [small|quiet|sad] voice near the {far}. "Help! Help!"'
    yield "It was {friend}, a {fmood} {fanimal}. {FHe} had fallen into a [deep|dark] hole."
    yield '"Do not be afraid," said {hero}. "I will [get you out|help you]."'
    yield "{hero} was too small to [reach|pull] {fhim}, so {he} ran to get {third} the {tanimal}."
    yield "{third} brought a [long|strong] rope. They [pulled|pulled and pulled] as hard as they could."
    yield "[Pop|At last|Slowly]! {friend} was [out of the hole|free]. {FHis} {part} hurt, but {fhe} was safe."
    yield '"You saved me," said {friend}, and {fhe} gave {hero} a {color} {thing}.'


def birthday(t: Teller) -> Iterator[str]:
    yield "[Today|It] was {hero}'s birthday, but nobody [said a word|came to the {home}]."
    yield '"[Did they forget|Did my friends forget] my birthday?" thought {hero}. {He} was {sorrow}.'
    yield "{He} went for a walk [in|to] the {place}. It was very quiet there."
    yield "When {he} came [home|back], all the windows were dark. {hero} opened the door slowly."
    yield '"Surprise!" shouted {friend} the {fanimal} and {third} the {tanimal}.'
    yield "There was {food} on the table, and {number} [candles|lights|balloons]."
    yield "{friend} gave {him} a {color} {thing}, and {third} gave {him} a {other}."
    yield '"This is the best birthday ever," said {hero}.'


def race(t: Teller) -> Iterator[str]:
    yield '{friend} the {fanimal} was the fastest in the {place}. "[Nobody|No one] can beat me," {fhe} said.'
    yield '"I will race you to the {far}," said {hero}. Everybody [laughed|came to watch].'
    yield '"One, two, three, go!" [called|shouted] {third} the {tanimal}. {friend} ran [like the wind|very fast].'
    yield "But {friend} stopped to [eat {food}|take a nap|talk to the birds]."
    yield "{hero} did not stop. Step by step, {he} went [on|on and on]."
    yield "When {friend} looked up, {hero} was [already|almost] at the {far}. {hero} won the race!"
    yield 'The prize was a {color} {thing}. "You can play with it too," {hero} told {friend}.'


def garden(t: Teller) -> Iterator[str]:
    yield 'In spring, {hero} found a [tiny|small] seed [in the {place}|on the road]. "What will it be?" {he} asked.'
    yield "{He} put it in the ground and gave it water from a {color} [bucket|cup]."
    yield "Every day, {he} [looked at it|sat next to it], but nothing [grew|happened]."
    yield '"It is [dead|just a stone]," said {friend} the {fanimal}. "No," said {hero}. "We must wait."'
    yield "{number} [days|weeks] passed. Then [one morning|one {weather} morning], there was a [tiny|small] green leaf."
    yield "It grew and grew, until it was a [tall|big] tree with {color} flowers."
    yield '"You were right," said {friend}. "[Good things take time|Waiting was worth it]."'


def music(t: Teller) -> Iterator[str]:
    yield "{hero} found an old {color} flute [in the {home}|near the {far}]. {He} began to play."
    yield "The sound was [terrible|awful|very loud]. The birds flew away, and {friend} the {fanimal} covered {fhis} ears."
    yield '"Please stop!" said {friend}. {hero} was {sorrow}, but {he} did not give up.'
    yield "{He} went to the {far} and played [every day|all week|each evening], all alone."
    yield "After {number} weeks, {third} the {tanimal} [heard|was listening to] a [sweet|soft|lovely] song."
    yield '"Who plays so well?" asked {third}. "It is {hero}!" said {friend}.'
    yield "That evening, {hero} played for the whole {place}, and everyone [danced|clapped|sang along]."


PLOTS: tuple[Callable[[Teller], Iterator[str]], ...] = (
    lost_and_found, storm, sharing, journey, learning, broken,
    rescue, birthday, race, garden, music,
)  # fmt: skip


def write_story(rng: random.Random) -> str:
    """One story of 100 to 180 words, ended by `The end.`"""
    teller = Teller(rng)
    plot = rng.choice(PLOTS)
    sentences = [opening(teller)]
    sentences += [habit(teller) for _ in range(rng.choice((1, 1, 2)))]
    sentences += [teller.say(template) for template in plot(teller)]
    sentences += [ending(teller) for _ in range(rng.choice((1, 1, 2)))]
    return " ".join(dict.fromkeys(sentences)) + " The end."


def write_stories(count: int, seed: int) -> list[str]:
    """`count` stories, always the same for the same seed."""
    rng = random.Random(seed)
    return [write_story(rng) for _ in range(count)]


if __name__ == "__main__":
    print("\n\n".join(write_stories(3, seed=0)))

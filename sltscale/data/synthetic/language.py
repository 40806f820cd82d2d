"""The small sign language of the synthetic corpus: its lexicon, its grammar, and the German and English it means.

Signs come in the order TIME PLACE OBJECT ADJECTIVE NUMBER SUBJECT RECIPIENT VERB MODAL NEGATION QUESTION; German puts
the finite verb second (first in a question) and the infinitive last, English uses do-support. Articles, prepositions,
inflection, "to" and "does" belong to no sign. The text is a function of the sign sequence, and a one-to-one one, so
that a model that recognises every sign can reach BLEU 100. The language is invented: it describes no signing community.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Language = Literal["de", "en"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
MIN_SIGNS, MAX_SIGNS = 3, 6


class Adverbial(NamedTuple):
    """A time or a place."""

    de: str
    en: str


class Person(NamedTuple):
    gender: Literal["m", "f", "n"]
    de: str
    en: str


class Thing(NamedTuple):
    gender: Literal["m", "f", "n"]
    de: str
    de_plural: str
    en: str
    en_plural: str


class Verb(NamedTuple):
    de: str
    de_present: str
    de_past: str
    en: str
    en_present: str
    en_past: str


TIMES = {
    "YESTERDAY": Adverbial("gestern", "yesterday"),
    "TODAY": Adverbial("heute", "today"),
    "TOMORROW": Adverbial("morgen", "tomorrow"),
    "EVENING": Adverbial("am abend", "in the evening"),
    "SUMMER": Adverbial("im sommer", "in summer"),
}
PLACES = {
    "MARKET": Adverbial("auf dem markt", "at the market"),
    "SCHOOL": Adverbial("in der schule", "at school"),
    "GARDEN": Adverbial("im garten", "in the garden"),
    "STATION": Adverbial("am bahnhof", "at the station"),
    "TOWN": Adverbial("in der stadt", "in town"),
}
PERSONS = {
    "TEACHER": Person("f", "lehrerin", "teacher"),
    "DOCTOR": Person("m", "arzt", "doctor"),
    "CHILD": Person("n", "kind", "child"),
    "MOTHER": Person("f", "mutter", "mother"),
    "FATHER": Person("m", "vater", "father"),
    "FRIEND": Person("m", "freund", "friend"),
    "BAKER": Person("m", "bäcker", "baker"),
    "NEIGHBOUR": Person("f", "nachbarin", "neighbour"),
}
THINGS = {
    "APPLE": Thing("m", "apfel", "äpfel", "apple", "apples"),
    "BOOK": Thing("n", "buch", "bücher", "book", "books"),
    "CAKE": Thing("m", "kuchen", "kuchen", "cake", "cakes"),
    "FLOWER": Thing("f", "blume", "blumen", "flower", "flowers"),
    "DOG": Thing("m", "hund", "hunde", "dog", "dogs"),
    "BAG": Thing("f", "tasche", "taschen", "bag", "bags"),
    "BALL": Thing("m", "ball", "bälle", "ball", "balls"),
    "PICTURE": Thing("n", "bild", "bilder", "picture", "pictures"),
}
ADJECTIVES = {
    "RED": Adverbial("rot", "red"),
    "BIG": Adverbial("groß", "big"),
    "NEW": Adverbial("neu", "new"),
    "OLD": Adverbial("alt", "old"),
    "BEAUTIFUL": Adverbial("schön", "beautiful"),
}
NUMBERS = {
    "TWO": Adverbial("zwei", "two"),
    "THREE": Adverbial("drei", "three"),
    "FIVE": Adverbial("fünf", "five"),
}
TRANSITIVE = {
    "BUY": Verb("kaufen", "kauft", "kaufte", "buy", "buys", "bought"),
    "SEEK": Verb("suchen", "sucht", "suchte", "look for", "looks for", "looked for"),
    "FIND": Verb("finden", "findet", "fand", "find", "finds", "found"),
    "PAINT": Verb("malen", "malt", "malte", "paint", "paints", "painted"),
    "LOSE": Verb("verlieren", "verliert", "verlor", "lose", "loses", "lost"),
}
DITRANSITIVE = {
    "GIVE": Verb("geben", "gibt", "gab", "give", "gives", "gave"),
    "SHOW": Verb("zeigen", "zeigt", "zeigte", "show", "shows", "showed"),
}
INTRANSITIVE = {
    "WORK": Verb("arbeiten", "arbeitet", "arbeitete", "work", "works", "worked"),
    "WAIT": Verb("warten", "wartet", "wartete", "wait", "waits", "waited"),
    "DANCE": Verb("tanzen", "tanzt", "tanzte", "dance", "dances", "danced"),
}
VERBS = TRANSITIVE | DITRANSITIVE | INTRANSITIVE
MODALS = {
    "WANT": Verb("wollen", "will", "wollte", "want", "wants", "wanted"),
    "CAN": Verb("können", "kann", "konnte", "can", "can", "could"),
}
NEGATION, QUESTION = "NOT", "QUESTION"

GLOSSES: tuple[str, ...] = (
    *TIMES, *PLACES, *THINGS, *ADJECTIVES, *NUMBERS, *PERSONS, *VERBS, *MODALS, NEGATION, QUESTION,
)  # fmt: skip

_NOMINATIVE = {"m": "der", "f": "die", "n": "das"}
_DATIVE = {"m": "dem", "f": "der", "n": "dem"}
_INDEFINITE = {"m": "einen", "f": "eine", "n": "ein"}  # accusative, as are the adjective endings
_ADJECTIVE_ENDING = {"m": "en", "f": "e", "n": "es"}


@dataclass(frozen=True)
class Sentence:
    """One sentence, each field a gloss or None; thing is None exactly for intransitive verbs."""

    subject: str
    verb: str
    thing: str | None = None
    recipient: str | None = None
    time: str | None = None
    place: str | None = None
    adjective: str | None = None
    number: str | None = None
    modal: str | None = None
    negated: bool = False
    question: bool = False

    @property
    def glosses(self) -> tuple[str, ...]:
        """The signs in the order in which they are performed."""
        signs = (
            self.time, self.place, self.thing, self.adjective, self.number, self.subject, self.recipient, self.verb,
            self.modal, NEGATION if self.negated else None, QUESTION if self.question else None,
        )  # fmt: skip
        return tuple(sign for sign in signs if sign is not None)

    def text(self, language: Language) -> str:
        """What the signs mean: lower-case words without punctuation."""
        words = self._german() if language == "de" else self._english()
        return " ".join(word for word in words if word)

    def _german(self) -> list[str]:
        person = PERSONS[self.subject]
        subject = f"{_NOMINATIVE[person.gender]} {person.de}"
        head = VERBS[self.verb] if self.modal is None else MODALS[self.modal]
        finite = head.de_past if self.time == "YESTERDAY" else head.de_present
        time = TIMES[self.time].de if self.time else ""
        rest = [
            f"{_DATIVE[PERSONS[self.recipient].gender]} {PERSONS[self.recipient].de}" if self.recipient else "",
            "nicht" if self.negated and self.thing is None else "",
            PLACES[self.place].de if self.place else "",
            self._german_object(),
            VERBS[self.verb].de if self.modal else "",
        ]
        if self.question:
            return [finite, subject, time, *rest]
        return [time, finite, subject, *rest] if time else [subject, finite, *rest]

    def _german_object(self) -> str:
        if self.thing is None:
            return ""
        thing = THINGS[self.thing]
        stem = ADJECTIVES[self.adjective].de if self.adjective else ""
        if self.number:
            return " ".join(filter(None, (NUMBERS[self.number].de, stem and stem + "e", thing.de_plural)))
        article = ("k" if self.negated else "") + _INDEFINITE[thing.gender]
        return " ".join(filter(None, (article, stem and stem + _ADJECTIVE_ENDING[thing.gender], thing.de)))

    def _english(self) -> list[str]:
        past = self.time == "YESTERDAY"
        verb, subject = VERBS[self.verb], f"the {PERSONS[self.subject].en}"
        infinitive = verb.en
        if self.modal == "CAN":
            auxiliary = MODALS["CAN"].en_past if past else MODALS["CAN"].en_present
        else:
            auxiliary = "did" if past else "does"
            if self.modal == "WANT":
                verb, infinitive = MODALS["WANT"], f"{MODALS['WANT'].en} to {infinitive}"
        negation = "not" if self.negated else ""
        rest = [
            f"the {PERSONS[self.recipient].en}" if self.recipient else "",
            self._english_object(),
            PLACES[self.place].en if self.place else "",
        ]
        time = TIMES[self.time].en if self.time else ""
        if self.question:
            return [auxiliary, subject, negation, infinitive, *rest, time]
        if self.negated or self.modal == "CAN":
            return [time, subject, auxiliary, negation, infinitive, *rest]
        finite = verb.en_past if past else verb.en_present
        return [time, subject, finite, f"to {VERBS[self.verb].en}" if self.modal else "", *rest]

    def _english_object(self) -> str:
        if self.thing is None:
            return ""
        thing = THINGS[self.thing]
        adjective = ADJECTIVES[self.adjective].en if self.adjective else ""
        if self.number:
            return " ".join(filter(None, (NUMBERS[self.number].en, adjective, thing.en_plural)))
        words = " ".join(filter(None, (adjective, thing.en)))
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def draw_sentence(rng: random.Random) -> Sentence:
    """A random sentence of MIN_SIGNS to MAX_SIGNS signs."""
    while True:
        sentence = _draw_any_length(rng)
        if MIN_SIGNS <= len(sentence.glosses) <= MAX_SIGNS:
            return sentence


def _draw_any_length(rng: random.Random) -> Sentence:
    def optional(signs: dict[str, Adverbial] | dict[str, Verb], share: float) -> str | None:
        chosen = rng.choice(list(signs))
        return chosen if rng.random() < share else None

    verb = rng.choice(list(VERBS))
    subject, recipient = rng.sample(list(PERSONS), 2)
    with_object = verb not in INTRANSITIVE
    number = optional(NUMBERS, 0.3) if with_object else None
    return Sentence(
        subject=subject,
        verb=verb,
        thing=rng.choice(list(THINGS)) if with_object else None,
        recipient=recipient if verb in DITRANSITIVE else None,
        time=optional(TIMES, 0.65),
        place=optional(PLACES, 0.45),
        adjective=optional(ADJECTIVES, 0.5) if with_object else None,
        number=number,
        modal=optional(MODALS, 0.3),
        # "keine zwei" would be a third way to negate; a counted object is never negated
        negated=rng.random() < 0.2 and number is None,
        question=rng.random() < 0.2,
    )

"""The demo's task: short free text in, one line of compact JSON out (contacts, orders, appointments).

A text is an opening and one clause per field, composed at random and shuffled, so that no whole text is a template. Training, validation
and test share no clause template, no opening, no name, street, item, company or mail domain: what is measured is reading, not recall.
Values are copied, never converted; the keys are a convention that only the training answers show. `examples` is pure in (split, seed, index).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import ConfigError, unknown

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
INSTRUCTION = "JSON: "


@dataclass(frozen=True)
class Example:
    """One text and the record that it states. `kind` is also the answer's `type`."""

    kind: str
    text: str
    answer: dict[str, Any]


@dataclass(frozen=True)
class Words:
    """What one split is made of; no list shares an entry with another split's."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    firms: tuple[str, ...]
    suffixes: tuple[str, ...]
    domains: tuple[str, ...]
    streets: tuple[str, ...]
    colors: tuple[str, ...]
    things: tuple[str, ...]
    joints: tuple[str, ...]
    openings: dict[str, tuple[str, ...]]
    asides: tuple[str, ...]
    clauses: dict[str, tuple[str, ...]]


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


WORDS: dict[str, Words] = {
    "train": Words(
        first=_list(
            "Anna|Boris|Carla|Diego|Emma|Felix|Grace|Henry|Irene|Jacob|Karen|Lucas|Maria|Nadia|Oliver|Paula|Ralph|Sara|Thomas|Ursula|Victor|Wendy"
            "|Yusuf|Zoe|Amir|Bella|Chen|Dana|Erik|Fatima|Gina|Hugo|Ivan|Julia|Kofi|Lena|Marco|Nora|Oscar|Priya|Quinn|Rosa|Simon|Tara"
        ),
        last=_list(
            "Adams|Baker|Castro|Dixon|Evans|Fischer|Garcia|Hughes|Ivanov|Jensen|Kumar|Lopez|Miller|Nguyen|Olsen|Patel|Reyes|Schmidt|Turner|Vargas"
            "|Walker|Young|Zhang|Allen|Brooks|Cohen|Duncan|Ellis|Foster|Gupta|Hansen|Jones|Kelly|Larsen|Moore|Novak|Owens|Price|Ross|Stone"
        ),
        firms=_list(
            "Northwind|Silver Oak|Bluebird|Redstone|Harbor|Summit|Evergreen|Lakeside|Ironworks|Sunrise|Maple|Granite|Falcon|Riverside|Crown|Pioneer"
            "|Atlas|Beacon|Cedar|Delta|Echo|Forge|Golden Gate|Horizon|Keystone|Liberty|Meridian|Nova|Orbit|Phoenix"
        ),
        suffixes=_list("Ltd|Inc|Group|Foods|Labs|Bank"),
        domains=_list("mail.com|inbox.net|post.org|office.com|web.de|fastmail.com|work.net|home.org"),
        streets=_list(
            "Main Street|Oak Avenue|Park Road|Hill Street|Lake Drive|Church Lane|Mill Road|King Street|Station Road|Bridge Street|Elm Avenue"
            "|Forest Drive|Garden Lane|High Street|River Road|School Lane|Valley Drive|West Street|Market Street|Queen Avenue"
        ),
        colors=_list("red|blue|small|wooden|black|steel|large|cotton|white|plastic"),
        things=_list(
            "chair|lamp|table|clock|mirror|blanket|kettle|shelf|basket|candle|bottle|pillow|ladder|bucket|carpet|bicycle|camera|printer|helmet"
            "|jacket|teapot|hammer|vase|radio"
        ),
        joints=(". ", "; ", ", ", ". "),
        openings={
            "contact": _list("New contact|Contact|Add to contacts|Card|New lead|Address book"),
            "order": _list("New order|Order|Please order|Sale|Order form|Order in"),
            "appointment": _list("Appointment|New appointment|Book a slot|Calendar|Schedule a visit|Set up a meeting"),
        },
        asides=_list("thanks|no rush|this is new|as agreed|more soon|do not forget|all good|sorry for the delay|urgent|see my note"),
        clauses={
            "name": _list(
                "name {}|this is {}|ask for {}|met {} today|speak with {}|add {}|my name is {}|{} here|her name is {}|known as {}|save {}|person {}"
            ),
            "company": _list(
                "works at {}|from {}|company {}|employer {}|joined {}|on staff at {}|the firm is {}|hired by {}|represents {}|part of {}|job at {}"
            ),
            "email": _list(
                "email {}|mail {}|write to {}|inbox {}|send mail to {}|mail goes to {}|reply to {}|mailbox {}|e-mail {}|online at {}"
            ),
            "phone": _list(
                "phone {}|call {}|tel {}|ring {}|mobile {}|dial {}|number {}|text {}|cell {}|by phone {}|phone is {}|calls to {}"
            ),
            "buyer": _list(
                "for {}|customer {}|bill {}|{} is buying|{} wants it|ordered by {}|buyer {}|sold to {}|client {}|{} will pay|paid by {}|{} placed it"
            ),
            "item": _list(
                "item {}|we need the {}|product {}|the {} again|one kind, {}|it is the {}|article {}|they want the {}|goods {}|pack the {}|model {}"
            ),
            "count": _list(
                "quantity {}|{} pieces|{} of them|count {}|{} units|qty {}|{} in total|how many: {}|exactly {}|make it {}|a set of {}|{} times"
            ),
            "street": _list(
                "ship to {}|deliver to {}|address {}|drop it at {}|goes to {}|send it to {}|street {}|bring it to {}|lives at {}|house at {}"
            ),
            "guest": _list(
                "with {}|{} is coming|meet {}|see {}|visitor {}|{} will join|{} asked for it|guest {}|{} confirmed|expecting {}|client {}"
            ),
            "date": _list("on {}|day {}|date {}|{} please|set for {}|{} is fine|planned {}|{} works|it is on {}|for {}|we said {}"),
            "time": _list("at {}|starts {}|time {}|{} sharp|from {}|around {}|hour {}|begin at {}|not before {}|{} o'clock|arrive {}"),
            "place": _list(
                "at {}|place {}|held at {}|in the {} office|go to {}|location {}|{} is the place|hosted by {}|inside {}|room at {}|building {}"
            ),
        },
    ),
    "valid": Words(
        first=_list("Alice|Bruno|Clara|David|Elena|Frank|Helen|Isaac|Laura|Martin|Olga|Peter"),
        last=_list("Carter|Fuller|Gray|Harris|Keller|Lewis|Morgan|Parker|Rivera|Singh|Wagner|Wood"),
        firms=_list("Bright Star|Canyon|Dolphin|Eagle|Fountain|Glacier|Juniper|Lotus"),
        suffixes=_list("Corp|Partners"),
        domains=_list("letters.com|desk.net|hub.org"),
        streets=_list("Canal Street|Rose Lane|Tower Road|Meadow Drive|Spring Avenue|Union Street"),
        colors=_list("yellow|heavy|silk|iron"),
        things=_list("desk|towel|guitar|spoon|wallet|tent|drill|curtain"),
        joints=(". ", ", "),
        openings={
            "contact": _list("Contact details|A new client"),
            "order": _list("Purchase|Order request"),
            "appointment": _list("Visit|Diary"),
        },
        asides=_list("cheers|as usual|talk soon"),
        clauses={
            "name": _list("talk to {}|I am {}|under the name {}"),
            "company": _list("employed by {}|business {}|team at {}"),
            "email": _list("e-mails to {}|contact by mail {}|address for mail {}"),
            "phone": _list("handset {}|call on {}|phone line {}"),
            "buyer": _list("requested by {}|{} ordered this|invoice {}"),
            "item": _list("product name {}|looking for the {}|buying the {}"),
            "count": _list("number of items {}|{} copies|we take {}"),
            "street": _list("shipping address {}|send to {}|delivery at {}"),
            "guest": _list("together with {}|{} is visiting|welcome {}"),
            "date": _list("the date is {}|happens on {}|{} if possible"),
            "time": _list("the time is {}|starting at {}|be there at {}"),
            "place": _list("the place is {}|meeting at {}|over at {}"),
        },
    ),
    "test": Words(
        first=_list(
            "Albert|Bianca|Conrad|Daphne|Edgar|Flora|Gustav|Hilda|Jonas|Kirsten|Leonard|Miriam|Nathan|Ophelia|Philip|Renata|Stefan|Teresa"
        ),
        last=_list(
            "Barnes|Collins|Dawson|Emerson|Fleming|Griffin|Holt|Jacobs|Knight|Lambert|Marsh|Norton|Pearson|Quigley|Russo|Shaw|Thorne|Weber"
        ),
        firms=_list("Amber|Black Pine|Cobalt|Driftwood|Emerald|Firefly|Hazel|Magnolia|Orchard|Pebble|Raven|Thunder"),
        suffixes=_list("Works|Studio|Media|Trading"),
        domains=_list("letterbox.com|paper.net|quickmail.org|central.com"),
        streets=_list(
            "Abbey Road|Chestnut Avenue|Dock Street|Grove Lane|Harvest Drive|Linden Street|Orchid Lane|Prospect Road|Sunset Drive|Temple Street"
        ),
        colors=_list("green|leather|round|glass|gray|paper"),
        things=_list("umbrella|violin|backpack|toaster|sofa|whistle|telescope|keyboard|hat|broom|scarf|notebook"),
        joints=(". ", "; ", ", "),
        openings={
            "contact": _list("Contact info|A new contact|Please save this contact"),
            "order": _list("An order|Please place an order|Incoming order"),
            "appointment": _list("An appointment|Please book a visit|Meeting"),
        },
        asides=_list("many thanks|take your time|as discussed|let me know"),
        clauses={
            "name": _list("the name is {}|talk with {}|please add {}|we met {}|his name is {}"),
            "company": _list("working at {}|the company is {}|employed at {}|comes from {}|has a job with {}"),
            "email": _list("the email is {}|mail to {}|email address {}|write an email to {}|by mail {}"),
            "phone": _list("telephone {}|phone number {}|the number is {}|call back on {}|mobile phone {}"),
            "buyer": _list("the customer is {}|{} is the buyer|{} would like to buy|bought by {}|please bill {}"),
            "item": _list("the item is the {}|please send the {}|the product is {}|wants to buy the {}|ordering the {}"),
            "count": _list("the quantity is {}|{} items|a total of {}|we need {}|the count is {}"),
            "street": _list("the address is {}|please deliver to {}|delivery to {}|shipped to {}|take it to {}"),
            "guest": _list("the guest is {}|meeting with {}|{} will come|{} will be there|we expect {}"),
            "date": _list("the day is {}|booked for {}|scheduled for {}|{} would be good|planned for {}"),
            "time": _list("it starts at {}|beginning at {}|the hour is {}|come at {}|{} exactly"),
            "place": _list("the location is {}|it is held at {}|we meet at {}|please go to {}|in the building of {}"),
        },
    ),
}

MONTHS = _list("January|February|March|April|May|June|July|August|September|October|November|December")
KINDS: dict[str, tuple[str, ...]] = {
    "contact": ("name", "company", "email", "phone"),
    "order": ("buyer", "item", "count", "street"),
    "appointment": ("guest", "date", "time", "place"),
}


def _person(words: Words, draw: random.Random) -> str:
    return f"{draw.choice(words.first)} {draw.choice(words.last)}"


def _company(words: Words, draw: random.Random) -> str:
    return f"{draw.choice(words.firms)} {draw.choice(words.suffixes)}"


def _email(words: Words, draw: random.Random) -> str:
    user = draw.choice((draw.choice(words.last), draw.choice(words.first))).lower()
    return f"{user}{draw.choice(('', draw.randrange(1, 100)))}@{draw.choice(words.domains)}"


VALUES: dict[str, Callable[[Words, random.Random], str | int]] = {
    "name": _person,
    "company": _company,
    "email": _email,
    "phone": lambda words, draw: f"{draw.randrange(200, 1000)}-{draw.randrange(10000):04d}",
    "buyer": _person,
    "item": lambda words, draw: f"{draw.choice(words.colors)} {draw.choice(words.things)}",
    "count": lambda words, draw: draw.randrange(2, 100),
    "street": lambda words, draw: f"{draw.randrange(1, 200)} {draw.choice(words.streets)}",
    "guest": _person,
    "date": lambda words, draw: f"{draw.choice(MONTHS)} {draw.randrange(1, 29)}",
    "time": lambda words, draw: f"{draw.randrange(7, 20)}:{draw.choice((0, 15, 30, 45)):02d}",
    "place": _company,
}


def examples(split: Split, *, seed: int, count: int, asides: float = 0.3) -> list[Example]:
    """The first `count` examples of a split under `seed`.

    `asides` is the chance of one more clause that states nothing; it makes texts longer and harder.
    """
    if split not in SPLITS:
        raise ConfigError(unknown("split", split, SPLITS), field="split", value=split, choices=SPLITS)
    return [_example(split, seed, index, asides) for index in range(count)]


def _example(split: Split, seed: int, index: int, asides: float) -> Example:
    draw = random.Random(f"{split}/{seed}/{index}")
    words = WORDS[split]
    kind = draw.choice(tuple(KINDS))
    record = {field: VALUES[field](words, draw) for field in KINDS[kind]}
    if kind == "contact":
        del record[draw.choice(("company", "email", "phone"))]
    clauses = [draw.choice(words.clauses[field]).format(value) for field, value in record.items()]
    if draw.random() < asides:
        clauses.append(draw.choice(words.asides))
    draw.shuffle(clauses)
    clauses.insert(0, draw.choice(words.openings[kind]))
    joint = draw.choice(words.joints)
    return Example(kind, _join(clauses, joint), {"type": kind, **record})


def _join(clauses: list[str], joint: str) -> str:
    if joint == ". ":
        clauses = [clause[0].upper() + clause[1:] for clause in clauses]
    return joint.join(clauses) + "."


def messages(example: Example) -> list[dict[str, str]]:
    """The conversation that teaches the example: the text, and its record as compact JSON."""
    return [*question(example), {"role": "assistant", "content": json.dumps(example.answer, separators=(",", ":"), ensure_ascii=False)}]


def question(example: Example) -> list[dict[str, str]]:
    """The conversation that asks for the example's record."""
    return [{"role": "user", "content": INSTRUCTION + example.text}]

"""A number and a seed in, as many different plain English sentences out: a small grammar over a few hundred words.

A template is a row of slots, a slot is filled by a word of its class, and classes agree by construction (past tense, so
no verb has to). Lower case and no punctuation: the text is exactly what is spoken.
"""

from collections.abc import Iterator

import numpy as np

from cache.errors import SettingsError

CLASSES = {
    "person": """farmer teacher doctor sailor baker painter driver writer singer brother sister mother father uncle aunt
        cousin neighbour child boy girl woman man king queen captain judge lawyer nurse soldier student hunter tailor
        butcher gardener waiter pilot engineer chemist butler widow stranger guest visitor friend leader""",
    "animal": """dog cat horse cow sheep goat pig rabbit fox wolf bear mouse frog bird duck goose chicken owl eagle fish
        whale spider donkey monkey tiger lion snake turtle squirrel pony""",
    "thing": """box bag book letter basket bottle cup plate spoon knife chair table lamp clock mirror picture key rope
        wheel hammer ladder bucket blanket pillow coat hat shoe glove ring coin stone brick shovel broom candle drum
        violin trumpet ticket map newspaper umbrella jacket sweater button needle thread barrel saddle tower statue
        cheese bread butter apple orange lemon pear cherry onion potato carrot sugar coffee honey pudding sandwich""",
    "place": """house garden kitchen school church market station harbour bridge river lake forest mountain valley
        village city street corner field farm barn castle island beach desert office hospital library museum theatre
        factory workshop cellar attic yard tunnel cave mill hotel""",
    "adjective": """old young big small heavy light quiet noisy clever foolish happy sad angry gentle brave shy tall short
        thin thick clean dirty rich poor kind cruel strange famous lazy busy hungry thirsty tired strong weak proud
        careful nervous cheerful honest""",
    "looks": """red blue green yellow white black brown grey purple golden silver wooden broken empty round square narrow
        wide bright dark wet dry cold warm sharp smooth rough soft shiny dusty rusty""",
    "did": """carried found lost bought sold took brought made broke mended painted washed cleaned hid showed gave threw
        caught kept watched wanted moved touched lifted dropped borrowed stole noticed remembered forgot measured chose
        pushed pulled opened closed covered""",
    "do": """carry find lose buy sell take bring make break mend paint wash clean hide show throw catch keep watch move
        touch lift drop borrow steal notice remember forget measure choose push pull open close cover""",
    "moved": "walked ran jumped crawled swam flew climbed travelled hurried wandered drifted marched returned",
    "by": "in near behind beside under above across from through around towards beyond inside outside",
    "when": """today yesterday tonight again once twice sometimes often never later early slowly quickly quietly suddenly
        together alone finally carefully already""",
    "time": """morning evening summer winter autumn spring night afternoon monday tuesday wednesday thursday friday
        saturday sunday january march august october""",
    "number": """two three four five six seven eight nine ten eleven twelve thirteen twenty thirty forty fifty sixty""",
    "many": """boxes bags books letters baskets bottles cups plates chairs tables lamps clocks keys wheels hammers coins
        stones bricks candles drums tickets maps buttons apples oranges lemons cherries onions potatoes horses cows birds
        ducks geese mice sheep wolves houses bridges villages""",
    "who": "i you we they he she everybody nobody somebody",
    "will": "will should could must might would",
}
WORDS = {name: words.split() for name, words in CLASSES.items()}
TEMPLATES = (
    "the {adjective} {person} {did} the {looks} {thing}",
    "the {person} {did} a {thing} {by} the {place}",
    "the {adjective} {animal} {moved} {by} the {place} {when}",
    "{who} {did} {number} {looks} {many} {by} the {place}",
    "{who} {will} {do} the {thing} before {time}",
    "{who} {will} never {do} that {looks} {thing}",
    "there were {number} {many} {by} the {adjective} {person}",
    "one {time} the {person} and the {animal} {moved} {by} the {place}",
    "please {do} the {thing} and {do} the {many}",
    "my {person} {did} your {thing} {when}",
    "the {looks} {thing} {by} the {place} was {looks}",
    "every {time} the {person} {did} {number} {many}",
    "why {will} the {person} {do} a {looks} {thing}",
    "the {animal} and the {animal} {moved} {by} {number} {many}",
    "nobody {did} the {thing} that the {adjective} {person} {did}",
    "this {time} the {place} {by} the {place} was {looks} and {looks}",
)
VOCABULARY = frozenset(word for words in WORDS.values() for word in words) | {
    word for template in TEMPLATES for word in f"an {template}".split() if not word.startswith("{")
}
MAX_SENTENCES = 100_000  # a small part of what the grammar can say, so that new ones are found at once


def sentences(count: int, seed: int) -> tuple[str, ...]:
    """So many different sentences; a larger count begins with the same ones.

    Raises:
        SettingsError: more than the grammar is good for.
    """
    if count > MAX_SENTENCES:
        raise SettingsError(
            f"{count} sentences are asked for, and there are {MAX_SENTENCES}; lower sentences_per_voice"
        )
    found: dict[str, None] = {}
    stream = _draw(np.random.default_rng([seed, 0x5E47]))
    while len(found) < count:
        found[next(stream)] = None
    return tuple(found)


def _draw(generator: np.random.Generator) -> Iterator[str]:
    while True:
        template = TEMPLATES[generator.integers(len(TEMPLATES))]
        words = [
            WORDS[slot[1:-1]][generator.integers(len(WORDS[slot[1:-1]]))] if slot.startswith("{") else slot
            for slot in template.split()
        ]
        spoken = zip(words, [*words[1:], ""], strict=True)
        yield " ".join("an" if word == "a" and following[0] in "aeiou" else word for word, following in spoken)

"""Numbers in, words out: one way to write a count, a size, a share and a learning rate, on every page and table."""

NARROW = "\N{NARROW NO-BREAK SPACE}"  # groups of thousands and units (ISO 80000-1)
NONE = "\N{EN DASH}"  # what is not there


def count(number: int) -> str:
    """2 412."""
    return f"{number:,}".replace(",", NARROW)


def params(number: int | None) -> str:
    """Parameters, three significant figures: 23.5 M, 512 k."""
    if not number:
        return NONE
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{significant(number / scale)}{NARROW}{unit}"
    return str(number)


def size(number: int | None) -> str:
    """Bytes in decimal units, three significant figures: 94.1 MB."""
    if number is None:
        return NONE
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{significant(number / scale)}{NARROW}{unit}"
    return f"{number}{NARROW}B"


def hours(number: float) -> str:
    """17.5 min, 1.24 h, 960 h."""
    return f"{significant(number)}{NARROW}h" if number >= 1 else f"{significant(number * 60)}{NARROW}min"


def significant(number: float) -> str:
    """Three significant figures without an exponent: 1.87, 23.5, 265, 1 240."""
    if number >= 1000:
        return count(round(number))
    decimals = 0 if number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{decimals}f}"


def loss(value: float, decimals: int = 3) -> str:
    """A loss, which may be negative: −0.834."""
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """A share as a number of per cent, one decimal; the unit stands in the head of the table."""
    return f"{100 * share:.1f}"


def points(score: float) -> str:
    """A SUPERB score, which may be negative: 866, −12."""
    return f"{score:.0f}".replace("-", "\N{MINUS SIGN}")


def metric(name: str, higher_is_better: bool) -> str:
    """The head of a column of scores: accuracy, %; an error rate says that less is better: PER, % ↓."""
    return f"{name}, %" if higher_is_better else f"{name}, % ↓"


def rate(number: float) -> str:
    """A learning rate as people type it: 0.01, 1.5e-5."""
    return f"{number:g}".replace("e-0", "e-").replace("e+0", "e")


SPELLED = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def spelled(number: int, one: str, many: str | None = None) -> str:
    """One student, two students, 13 students: for running text."""
    return (
        plural(number, one, many)
        if number >= len(SPELLED)
        else f"{SPELLED[number]} {one if number == 1 else many or one + 's'}"
    )


def plural(number: int, one: str, many: str | None = None) -> str:
    """1 student, 2 students."""
    return f"{count(number)} {one if number == 1 else many or one + 's'}"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def ranges(numbers: list[int]) -> str:
    """Layers by number: 0–4, 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)

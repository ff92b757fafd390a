"""Writes the shipped data set: a spoken request at home → one small JSON command.

    python -m handtuned.datasets.make        # rewrites handtuned/datasets/*.jsonl, byte for byte

Every command has sentence templates of its own for training and others for the held-out file, so a good held-out score
means that new phrasings are understood; a few slot values (rooms, cities, tasks …) occur only in the held-out file. A
request has exactly one right answer: the command and then its slots in a fixed order, as compact JSON, every value
copied from the request. Exact match is therefore a fair metric.

`{slot}` stands for a value, `[slot=value]` at the end of a template fixes one that the sentence says in other words.
"""

import itertools
import json
import random
import re
from pathlib import Path

from ..nn.files import whole_file

SEED = 0
SYSTEM = "Answer with one JSON command."
ROWS = {"train": 75, "eval": 8}  # for each command

# slot → values for both files / values for the held-out file alone
SLOTS = {
    "room": """kitchen, bedroom, bathroom, living room, dining room, hallway, office, garage, basement, nursery,
        guest room, laundry room, attic, study, pantry, studio, cellar, workshop / playroom, game room, library""",
    "light": "on, off",
    "percent": "10, 15, 20, 25, 30, 40, 45, 50, 60, 65, 70, 75, 90 / 35, 55",
    "color": "red, blue, green, purple, pink, yellow, white, turquoise, gray, brown, silver / gold, violet",
    "degrees": "15, 16, 17, 18, 19, 20, 21, 22, 23, 24 / 25, 26",
    "minutes": "2, 3, 4, 5, 6, 7, 9, 10, 12, 15, 20, 25, 30, 40, 45 / 14, 35, 50",
    "label": """pasta, rice, cake, pizza, bread, laundry, tea, roast, soup, chicken, stew, steak
        / lasagna, risotto""",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "early": """5:00, 5:15, 5:30, 5:45, 6:00, 6:10, 6:15, 6:30, 6:45, 7:00, 7:10, 7:15, 7:30, 7:45, 8:00, 8:15,
        8:30, 8:45, 9:00, 9:10, 9:30 / 5:20, 6:40, 7:05""",
    "time": """10:00, 10:30, 10:45, 11:15, 11:30, 12:00, 12:15, 12:45, 13:00, 13:30, 14:00, 14:15, 14:45, 15:00,
        15:30, 16:00, 16:15, 17:30, 17:45, 18:00, 18:15, 19:00, 19:45, 20:30, 21:00 / 11:20, 13:40, 16:10""",
    "music": "jazz, blues, reggae, disco, folk music, piano music, Mozart, Chopin, Vivaldi, Beethoven / Bach, salsa",
    "quantity": "2, 3, 4, 5, 6, 8, 10, 12 / 7, 9",
    "item": """eggs, lemons, onions, bananas, tomatoes, light bulbs, bags of flour, cans of beans, bottles of milk,
        batteries, apples, bars of soap / avocados, jars of honey""",
    "task": """call the dentist, water the plants, walk the dog, take out the trash, pay the rent, feed the cat,
        pick up the kids, book a flight, charge the car, bake a cake, send the report, clean the oven
        / return the library books, call the plumber, iron a shirt""",
    "door": "front door, back door, garage door, cellar door, side door, balcony door, patio door / garden gate",
    "lock": "lock, unlock",
    "blinds": "open, close",
    "city": """Paris, London, Berlin, Madrid, Rome, Vienna, Oslo, Lisbon, Dublin, Athens, Prague, Tokyo, Boston,
        Chicago / Helsinki, Toronto""",
}

# command → (JSON key → slot, training sentences, held-out sentences); `|` or a line end separates sentences.
COMMANDS = {
    "light": (
        {"room": "room", "action": "light"},
        """
        Turn {light} the lights in the {room}. | Turn the {room} lights {light}. | I want the {room} lights {light}.
        Switch the {room} light {light}, please. | Please switch {light} the {room} lamp. | {room} lights {light}.
        Can you turn the light in the {room} {light}? | Lights {light} in the {room}, please.
        Would you switch {light} the lamps in the {room}? | The light in the {room} should be {light}.
        It is too dark in the {room}. [light=on] | I can't see a thing in the {room}. [light=on]
        Nobody is in the {room}, so no light is needed. [light=off]
        We are leaving the {room}, so lights off. [light=off]
        Make sure that the {room} light is {light}. | Okay, {room} light {light} now.
        I'd like to have the {room} lights turned {light}. | {room} lamps {light}, if you can.
        Could the lamp in the {room} be switched {light}? | In the {room}, switch the lamps {light}.
        """,
        """
        Could you switch the lights {light} in the {room}? | I'd like the lamp in the {room} turned {light}.
        Hey, {room} lamp {light}, please. | Please put the {room} lights {light} for me.
        """,
    ),
    "light brightness": (
        {"room": "room", "percent": "percent"},
        """
        Dim the {room} lights to {percent} percent. | Set the {room} lights to {percent} percent.
        Set the brightness in the {room} to {percent} percent. | Brighten the {room} lamp to {percent} percent.
        I'd like the {room} light at {percent} percent. | {percent} percent brightness in the {room}, please.
        Please put the lights in the {room} at {percent} percent brightness.
        Can you dim the lamp in the {room} to {percent} percent? | Lower the {room} lights to {percent} percent.
        Raise the light level in the {room} to {percent} percent. | Make the {room} lights {percent} percent bright.
        The lights in the {room} should be at {percent} percent. | Change the {room} brightness to {percent} percent.
        Bring the lamps in the {room} down to {percent} percent. | {room} lights at {percent} percent, please.
        I want {percent} percent light in the {room}. | Could the {room} lamp go to {percent} percent?
        Turn the lights in the {room} up to {percent} percent. | Give me {percent} percent brightness in the {room}.
        I need the {room} lamps at {percent} percent brightness.
        """,
        """
        Could you bring the {room} lights to {percent} percent? | Let me have {percent} percent light in the {room}.
        Adjust the lamp in the {room} to {percent} percent brightness.
        Keep the {room} light level at {percent} percent.
        """,
    ),
    "light color": (
        {"room": "room", "color": "color"},
        """
        Make the {room} lights {color}. | Turn the {room} lights {color}. | Change the light in the {room} to {color}.
        Set the {room} lamp to {color}. | I want {color} light in the {room}. | {color} lights in the {room}, please.
        Can you make the lamp in the {room} {color}? | Please color the {room} {color}.
        Switch the {room} light color to {color}. | Let the {room} glow {color}. | Give the {room} a {color} light.
        I'd like the lights in the {room} to be {color}. | The {room} should be lit in {color}.
        Use {color} for the lamps in the {room}. | Set the color of the {room} lights to {color}.
        Could the {room} lights be {color}? | The {room} lamps would look good in {color}.
        In the {room}, change the lamp to {color}. | Paint the {room} with {color} light.
        I'd prefer the {room} lit in {color}.
        """,
        """
        Could you turn the lamp in the {room} {color}? | Show {color} light in the {room}.
        Change the color in the {room} to {color}, please. | Let the {room} lamps shine {color}.
        """,
    ),
    "heat": (
        {"room": "room", "degrees": "degrees"},
        """
        Set the {room} to {degrees} degrees. | Heat the {room} to {degrees} degrees.
        Make it {degrees} degrees in the {room}. | Set the thermostat in the {room} to {degrees} degrees.
        I want {degrees} degrees in the {room}. | Cool the {room} down to {degrees} degrees.
        Please warm the {room} up to {degrees} degrees. | Can you set the {room} thermostat to {degrees}?
        Keep the {room} at {degrees} degrees. | {degrees} degrees in the {room}, please.
        The {room} should be {degrees} degrees warm. | Turn the heating in the {room} to {degrees} degrees.
        Change the {room} temperature to {degrees} degrees. | Put the {room} heater at {degrees} degrees.
        Bring the temperature in the {room} to {degrees} degrees. | I'd like it to be {degrees} degrees in the {room}.
        Could the {room} be at {degrees} degrees? | I need the {room} heated to {degrees} degrees.
        Lower the {room} thermostat to {degrees} degrees. | Give the {room} a temperature of {degrees} degrees.
        """,
        """
        Could you get the {room} to {degrees} degrees? | I'd like the temperature in the {room} at {degrees} degrees.
        Adjust the {room} heating to {degrees} degrees, please. | Have the {room} warmed to {degrees} degrees.
        """,
    ),
    "timer": (
        {"label": "label", "minutes": "minutes"},
        """
        Set a timer for the {label} for {minutes} minutes. | Set a {minutes}-minute timer for the {label}.
        Start a {label} timer for {minutes} minutes. | Time the {label} for {minutes} minutes.
        I need a {minutes}-minute timer for the {label}. | The {label} needs {minutes} minutes; start a timer.
        Count down {minutes} minutes for the {label}. | Please start a timer of {minutes} minutes for the {label}.
        {label} timer, {minutes} minutes, please. | Can you time {minutes} minutes for the {label}?
        Give me a {label} timer of {minutes} minutes. | Tell me when the {label} has had {minutes} minutes.
        Put {minutes} minutes on the {label} timer. | Start counting {minutes} minutes for the {label}.
        Set the {label} timer to {minutes} minutes. | Set a {minutes}-minute {label} timer.
        I'd like a countdown of {minutes} minutes for the {label}. | Run a timer on the {label}, {minutes} minutes.
        Let me know in {minutes} minutes that the {label} is done.
        Could the {label} timer run for {minutes} minutes?
        """,
        """
        Could you start a {minutes}-minute {label} timer? | I'd like a timer on the {label} for {minutes} minutes.
        Begin a countdown of {minutes} minutes for the {label}, please.
        My {label} should be timed for {minutes} minutes.
        """,
    ),
    "wake": (
        {"day": "day", "time": "early"},
        """
        Wake me up at {early} on {day}. | Set an alarm for {early} on {day}. | Set my alarm for {day} at {early}.
        I need an alarm on {day} at {early}. | Please wake me on {day} at {early}. | On {day}, wake me at {early}.
        I have to get up at {early} on {day}. | Alarm for {day}, {early}, please.
        Can you set the alarm to {early} for {day}? | Give me an alarm at {early} on {day}.
        Get me out of bed at {early} on {day}. | On {day} I have to be awake by {early}.
        Make the alarm ring at {early} on {day}. | Schedule an alarm for {day} at {early}.
        My alarm on {day} should go off at {early}. | I want to be woken at {early} on {day}.
        Don't let me sleep past {early} on {day}. | I'd like to wake up on {day} at {early}.
        Could the alarm go off at {early} on {day}? | {day} at {early}, wake me up, please.
        """,
        """
        Could you wake me at {early} this {day}? | I want to get up on {day} at {early}.
        Put an alarm on {day} for {early}, please. | Ring the alarm on {day} at {early}.
        """,
    ),
    "music": (
        {"play": "music", "room": "room"},
        """
        Play {music} in the {room}. | Play some {music} in the {room}, please. | I want to hear {music} in the {room}.
        Put on {music} in the {room}. | Start playing {music} in the {room}. | Let me listen to {music} in the {room}.
        Can you play {music} on the {room} speaker? | I'm in the mood for {music} in the {room}.
        Some {music} in the {room} would be nice. | Please put some {music} on in the {room}.
        Stream {music} to the {room}. | In the {room}, play {music}. | Use the {room} speakers to play {music}.
        Fill the {room} with {music}. | How about some {music} in the {room}? | I'd like {music} in the {room}.
        Could the {room} speaker play {music}? | I need some {music} in the {room}. | {music} in the {room}, please.
        Turn on some {music} in the {room}.
        """,
        """
        Could you put {music} on in the {room}? | I'd love to listen to some {music} in the {room}.
        Start some {music} on the speakers in the {room}. | Have the {room} speakers play {music}.
        """,
    ),
    "buy": (
        {"item": "item", "quantity": "quantity"},
        """
        Add {quantity} {item} to the shopping list. | Put {quantity} {item} on the shopping list.
        Put {quantity} {item} on my list, please. | We need {quantity} {item}. | We need to buy {quantity} {item}.
        I have to buy {quantity} {item}. | Please add {quantity} {item} to my groceries.
        Can you write down {quantity} {item} for the store? | Please pick up {quantity} {item}.
        Note {quantity} {item} for the next shopping trip. | Shopping list: {quantity} {item}.
        {quantity} {item} should go on the shopping list. | Get {quantity} {item} from the store.
        Order {quantity} {item}, please. | Remember to buy {quantity} {item}. | I want to buy {quantity} {item}.
        I'd like {quantity} {item} from the market. | There are no {item} left; buy {quantity}.
        Could {quantity} {item} go on the list? | The list should have {quantity} {item}.
        """,
        """
        Could you add {quantity} {item} to our list? | I need {quantity} {item} from the supermarket.
        Write {quantity} {item} on the shopping list, please. | Let's buy {quantity} {item}.
        """,
    ),
    "remember": (
        {"task": "task", "time": "time"},
        """
        Remind me to {task} at {time}. | At {time}, remind me to {task}. | Set a reminder to {task} at {time}.
        Don't let me forget to {task} at {time}. | I must {task} at {time}, so please remind me.
        Please remind me at {time} that I have to {task}. | Reminder at {time}: {task}. | Tell me at {time} to {task}.
        Can you remind me to {task} at {time}? | Make a reminder for {time} to {task}. | Make sure I {task} at {time}.
        I have to {task} at {time}; don't let me forget. | See to it that I {task} at {time}.
        At {time} I should {task}; remind me. | Send me a reminder at {time} to {task}.
        I need to remember to {task} at {time}. | I'd like to be reminded at {time} to {task}.
        When the clock shows {time}, tell me to {task}. | Could the reminder to {task} come at {time}?
        I want a reminder at {time} to {task}.
        """,
        """
        Could you remind me at {time} to {task}? | I'd like a reminder to {task} at {time}.
        See that I'm reminded to {task} at {time}. | Help me remember to {task} at {time}.
        """,
    ),
    "lock": (
        {"door": "door", "action": "lock"},
        """
        {lock} the {door}. | Please {lock} the {door}. | Can you {lock} the {door} for me? | {lock} the {door} now.
        I want you to {lock} the {door}. | Go ahead and {lock} the {door}. | The {door} should be locked. [lock=lock]
        Make sure the {door} is locked. [lock=lock] | I think I left the {door} unlocked, so lock it. [lock=lock]
        We are going to bed, so lock the {door}. [lock=lock] | Our guests are here, so unlock the {door}. [lock=unlock]
        Let them in through the {door}. [lock=unlock] | It's time to {lock} the {door}.
        Don't forget to {lock} the {door}. | I need the {door} to be unlocked. [lock=unlock]
        I'm at the {door}, please {lock} it. | Could the {door} be unlocked, please? [lock=unlock]
        I'd like the {door} locked. [lock=lock] | I need you to {lock} the {door} right away.
        Would you {lock} the {door} before dinner?
        """,
        """
        Could you {lock} the {door}, please? | You can {lock} the {door} now. | I'd like you to {lock} the {door}.
        Someone has to {lock} the {door}.
        """,
    ),
    "blinds": (
        {"room": "room", "action": "blinds"},
        """
        {blinds} the blinds in the {room}. | {blinds} the {room} blinds. | Please {blinds} the {room} blinds.
        Can you {blinds} the blinds in the {room}? | I want you to {blinds} the {room} shades.
        {blinds} the shades in the {room}, please. | The blinds in the {room} should be open. [blinds=open]
        Let some daylight into the {room}. [blinds=open] | {blinds} all of the blinds in the {room}.
        The sun is too strong in the {room}, so close the blinds. [blinds=close] | In the {room}, {blinds} the blinds.
        It's time to {blinds} the {room} blinds. | Go ahead and {blinds} the blinds in the {room}.
        Would you {blinds} the window blinds in the {room}? | I'd like the {room} blinds closed. [blinds=close]
        The {room} shades should be closed. [blinds=close] | Could the {room} blinds be opened? [blinds=open]
        {blinds} the blinds in the {room} before lunch. | Don't forget to {blinds} the {room} shades.
        I need some privacy in the {room}. [blinds=close]
        """,
        """
        Could you {blinds} the {room} blinds, please? | You can {blinds} the blinds in the {room} now.
        I need you to {blinds} the shades in the {room}. | Someone should {blinds} the {room} blinds.
        """,
    ),
    "weather": (
        {"city": "city", "day": "day"},
        """
        What will the weather be like in {city} on {day}? | How is the weather in {city} on {day}?
        Will it rain in {city} on {day}? | Do I need an umbrella in {city} on {day}? | Will {city} be cold on {day}?
        Tell me the weather in {city} for {day}. | Give me the {day} forecast for {city}.
        What's the forecast for {city} on {day}? | Is it going to be sunny on {day} in {city}?
        How warm will it be in {city} on {day}? | Weather for {city} on {day}, please.
        Check the weather in {city} for {day}. | On {day}, will it snow in {city}? | {city} weather on {day}, please.
        I'm going to {city} on {day}; how is the weather? | What temperature do they expect in {city} on {day}?
        Can you tell me if it will be windy in {city} on {day}? | Let me know the weather in {city} on {day}.
        Please show me the forecast for {day} in {city}. | Should I pack a coat for {city} on {day}?
        """,
        """
        Could you check the {day} weather in {city}? | Is rain expected in {city} on {day}?
        I'd like to know the forecast for {city} on {day}. | What is the sky like in {city} on {day}?
        """,
    ),
}


def slot_values(slot: str) -> tuple[list, list]:
    """The values of a slot for both files, and those for the held-out file alone; numbers as integers."""
    common, _, held_out = SLOTS[slot].partition("/")
    return tuple([int(value) if value.isdigit() else value for value in map(str.strip, values.split(",")) if value]
                 for values in (common, held_out))  # fmt: skip


def sentences(block: str) -> list[tuple[str, dict[str, str]]]:
    """The templates of a block, each with the slot values that it fixes."""
    found = []
    for sentence in re.split(r" \| |\n", block.strip()):
        text, slot, value = re.fullmatch(r"(.*?)(?: \[(\w+)=(\w+)\])?", sentence.strip()).groups()
        found.append((text, {slot: value} if slot else {}))
    return found


def make_row(command: str, text: str, keys: dict[str, str], values: dict[str, object]) -> dict:
    """One chat row; `values` holds the value of every slot."""
    request = text.format(**values)
    asked = request[0].upper() + request[1:]
    answer = {"command": command.split()[0], **{key: values[slot] for key, slot in keys.items()}}
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked},
                         {"role": "assistant", "content": json.dumps(answer, separators=(",", ":"))}]}  # fmt: skip


def make_rows(split: str, seed: int = SEED) -> list[dict]:
    """The rows of one file, shuffled; `split` is "train" or "eval". No request occurs twice."""
    # Of Python's random streams only random() is promised to stay the same in every version.
    rng = random.Random(f"{seed} {split}")
    rows = {}
    for command, (keys, train, held_out) in COMMANDS.items():
        templates = sentences(train if split == "train" else held_out)
        target = len(rows) + ROWS[split]
        for text, fixed in itertools.cycle(templates):
            values = dict(fixed)
            for slot in keys.values():
                common, unseen = slot_values(slot)
                choices = common if split == "train" else common + unseen
                values.setdefault(slot, choices[int(rng.random() * len(choices))])
            row = make_row(command, text, keys, values)
            rows.setdefault(row["messages"][1]["content"], row)
            if len(rows) == target:
                break
    return sorted(rows.values(), key=lambda row: rng.random())


def write(directory: Path) -> None:
    """Write `home_train.jsonl` and `home_eval.jsonl`, each whole or not at all."""
    for split in ("train", "eval"):
        path = directory / f"home_{split}.jsonl"
        lines = "".join(json.dumps(row) + "\n" for row in make_rows(split))
        with whole_file(path) as temporary:
            temporary.write_bytes(lines.encode())
        print(f"{path}: {lines.count(chr(10))} rows")


if __name__ == "__main__":
    write(Path(__file__).parent)

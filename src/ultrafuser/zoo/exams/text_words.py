"""The names, things and verbs of the text exam. Lists with two entries hold different words for each split."""

from __future__ import annotations

# Women and men take turns.
NAMES = {
    "train": tuple(
        "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Nick Olga Paul Rosa Sam Tina Victor".split()
    ),
    "test": tuple(
        "Alice Bruno Carla Dennis Eva Frank Hanna Ivan Julia Kevin Laura Martin Nora Oscar Petra Simon".split()
    ),
}
THINGS = {
    "train": tuple(
        "kite lamp drum coat violin basket mirror ladder candle blanket hammer bottle ticket carpet whistle telescope "
        "helmet umbrella pillow wallet".split()
    ),
    "test": tuple("guitar teapot compass scarf camera bucket saddle trumpet lantern puzzle kettle shovel".split()),
}
PLACES = {
    "train": tuple("kitchen garden attic garage school cellar library harbour bakery museum".split()),
    "test": tuple("workshop stable theatre office chapel castle station barn".split()),
}
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
CITIES = tuple("Oslo Paris Madrid Vienna Dublin Lisbon Prague Athens Rome Berlin Warsaw Helsinki".split())
SORTED_WORDS = tuple(
    "anchor bridge castle dragon engine forest garden hammer island jungle kettle ladder marble needle orange pencil "
    "quartz river silver tunnel urchin valley window yellow zebra".split()
)

# verb, its third person, its past tense, and what follows it
VERBS = tuple(
    tuple(line.split(" ", 3))
    for line in """write writes wrote a long letter
eat eats ate a green apple
drink drinks drank some cold water
sing sings sang an old song
drive drives drove a small van
buy buys bought a new chair
bring brings brought the heavy box
build builds built a wooden hut
catch catches caught the last train
draw draws drew a black horse
find finds found the lost key
give gives gave a short speech
grow grows grew red roses
hide hides hid the gold coin
hold holds held the rope
keep keeps kept the secret
lose loses lost the map
make makes made fresh soup
meet meets met an old friend
read reads read the news
ride rides rode a white pony
sell sells sold the farm
send sends sent a postcard
choose chooses chose a red tie
speak speaks spoke a few words
steal steals stole the picture
swim swims swam a hundred metres
take takes took the early bus
teach teaches taught a hard lesson
tear tears tore the paper
throw throws threw the ball
wear wears wore a grey hat
win wins won the race
cook cooks cooked a big dinner
paint paints painted the fence
clean cleans cleaned the window
carry carries carried the bags
open opens opened the door
plan plans planned the journey
study studies studied the stars""".splitlines()
)

# (relation of A to B, relation of B to C) by kind, and what A is to C: for a woman, for a man
RELATIONS = {"parent": ("mother", "father"), "sibling": ("sister", "brother"), "child": ("daughter", "son")}
COMPOSED = {
    ("parent", "parent"): ("grandmother", "grandfather"),
    ("sibling", "parent"): ("aunt", "uncle"),
    ("child", "sibling"): ("niece", "nephew"),
    ("parent", "sibling"): ("mother", "father"),
    ("sibling", "child"): ("daughter", "son"),
    ("child", "child"): ("granddaughter", "grandson"),
    ("child", "parent"): ("sister", "brother"),
    ("sibling", "sibling"): ("sister", "brother"),
}

"""Which tasks a part of the pre-training pool is made for."""

from __future__ import annotations

TASKS_OF = {
    "cifar10": ("cifar10", "animals", "vehicles"),
    "fashion_mnist": ("fashion", "shoes", "tops"),
    "mnist": ("digits", "colored_digits"),
    "noto_emoji": ("twemoji", "apple_emoji", "facebook_emoji"),
    "animate": ("animals",),
    "inanimate": ("vehicles",),
    "glyphs": ("digits", "fashion", "twemoji"),
}
# Tasks whose images come from sources of which pre-training has none (recipes/suites/mix32.yaml).
FOREIGN = (
    "optdigits",
    "twemoji",
    "apple_emoji",
    "facebook_emoji",
    "letters",
    "hebrew",
    "arabic",
    "devanagari",
    "hiragana",
    "handwriting",
    "icons",
    "sprites",
    "textures",
)
# A task whose images, without labels, pick the clusters that `subset` trains on.
PICKED_BY = {
    "cifar10": "cifar10",
    "mnist": "digits",
    "fashion_mnist": "fashion",
    "noto_emoji": "twemoji",
}

"""What the instructions are about, and words that answers have to use: each in one split only."""

from typing import Literal

Split = Literal["train", "dev", "test"]

# An answer has to name its topic, so each is a word that has no other name and few forms.
TOPICS: dict[Split, tuple[str, ...]] = {
    "train": (
        "bread", "rain", "bicycles", "honey", "trains", "winter", "coffee", "dogs", "mountains", "music", "gardens",
        "clocks", "bridges", "salt", "libraries", "football", "glass", "whales", "candles", "markets", "chess",
        "windmills", "soap", "owls", "islands", "paper", "horses", "lighthouses", "cheese", "shoes", "stars", "deserts",
        "apples", "hospitals", "kites", "volcanoes", "rice", "museums", "bees", "ships", "mirrors", "forests", "soup",
        "airports", "spiders", "ice", "wolves", "castles", "pencils", "tea", "farms", "dolphins", "umbrellas", "steel",
        "comets", "bakeries", "turtles", "maps", "dancing", "wool", "elephants", "sand", "keys", "penguins",
    ),
    "dev": (
        "rivers", "cats", "chocolate", "schools", "snow", "guitars", "tigers", "oranges", "telescopes", "wine",
        "beaches", "robots", "butter", "parks", "eagles", "theatres", "cotton", "camels", "fireworks", "tunnels",
        "goats", "lemons", "drums", "stadiums", "kitchens", "rabbits", "diamonds", "helicopters", "newspapers",
        "gloves", "cherries", "pyramids", "violins", "autumn", "ducks", "wallets",
    ),
    "test": (
        "oceans", "milk", "birds", "trees", "gold", "pianos", "lions", "potatoes", "cameras", "clouds", "lakes",
        "buses", "sugar", "frogs", "hotels", "poems", "silk", "sharks", "rainbows", "caves", "sheep", "rockets",
        "tomatoes", "planets", "ants", "cinemas", "carpets", "foxes", "earthquakes", "ponds", "swimming", "onions",
        "monkeys", "letters", "ladders", "wheat", "painting", "tractors", "storms", "pigeons", "giraffes", "bananas",
        "trumpets", "pirates", "pillows", "squirrels", "copper", "submarines", "dictionaries", "helmets", "grapes",
        "statues", "flutes", "mushrooms", "swans", "lanterns", "carrots", "harbours", "glaciers", "puppets",
    ),
}  # fmt: skip

WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("because", "old", "often", "people", "small", "water", "never", "beautiful", "years", "many", "light"),
    "dev": ("always", "young", "world", "strong", "morning"),
    "test": ("today", "simple", "family", "important", "large", "summer", "together", "quiet"),
}

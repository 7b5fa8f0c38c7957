"""The words that the built-in model knows, and what it says to a few fixed sentences."""

from __future__ import annotations

WORDS = tuple(
    """the and you that was for are with his they this have from one had word but not what all were
    when your can said there use each which she how their will other about out many then them
    these some her would make like him into time has look two more write see number way could
    people than first water been call who oil its now find long down day did get come made may
    part over new sound take only little work know place year live back give most very after
    thing our just name good sentence man think say great where help through much before line
    right too mean old any same tell boy follow came want show also around form three small
    set put end does another well large must big even such because turn here why ask went men
    read need land different home move try kind hand picture again change off play spell air
    away house point page letter mother answer found study still learn should world high every
    near add food between own below country plant last school father keep tree never start
    city earth eye light thought head under story saw left few while along might close
    something seem next hard open example begin life always those both paper together got
    group often run important until children side feet car mile night walk white sea began
    grow took river four carry state once book hear stop without second later miss idea enough
    eat face watch far really almost let above girl sometimes mountain cut young talk soon
    list song being leave family body music color stand sun question fish area mark dog horse
    birds problem complete room knew since ever piece told usually friends easy heard order
    red door sure become top ship across today during short better best however low hours
    black products happened whole measure remember early waves reached listen wind rock space
    covered fast several hold himself toward five step morning passed vowel true hundred
    against pattern numeral table north slowly money map farm pulled draw voice power town
    fine drive lead cry dark machine note wait plan figure star box noun field rest able pound
    done beauty stood contain front teach week final gave green quick develop ocean warm free
    minute strong special mind behind clear tail produce fact street inch nothing course stay
    wheel full force blue object decide surface deep moon island foot system busy test record
    boat common gold possible plane dry wonder laugh thousand ago ran check game shape hot
    brought heat snow tire bring yes distant fill east paint language among banana kernel
    memory server token prompt worker engine hello goodbye please thanks""".split()
)

ANIMALS = tuple(
    """fox cat dog bear wolf hare owl crow swan duck goose horse cow goat sheep pig mouse frog toad
    snail ant bee fly moth crab seal whale shark eel trout lion tiger zebra camel otter mole
    """.split()
)

THINGS = tuple(
    """lamp key ball book cup bell drum coin ring kite boat cart wheel spoon plate chair table door
    basket bottle button candle carpet clock compass feather flute hammer ladder lantern
    letter mirror needle pencil pillow rope shovel trumpet umbrella violin whistle""".split()
)

NAMES = tuple(
    "Tim Ann Bob Eva Max Lea Sam Ida Tom Mia Ben Zoe Leo Ada Jon Amy Kim Roy May Gus".split()
)

PLACES = (
    "the river",
    "the forest",
    "the hill",
    "the lake",
    "the mill",
    "the bridge",
    "the harbor",
    "the market",
    "the castle",
    "the garden",
)

CATEGORIES = {
    "colors": ("red", "green", "blue", "yellow", "white", "black", "orange", "brown"),
    "fruits": ("apple", "banana", "cherry", "grape", "lemon", "mango", "pear", "plum"),
    "animals": ("cat", "dog", "horse", "cow", "sheep", "goat", "duck", "fox"),
    "planets": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": ("January", "February", "March", "April", "May", "June", "July", "August"),
    "metals": ("iron", "gold", "silver", "copper", "tin", "zinc", "lead", "nickel"),
    "tools": ("hammer", "saw", "drill", "knife", "axe", "file", "plane", "wrench"),
}

UNKNOWN_ANSWER = "I can only count, repeat, spell, list, add, remember codes and tell stories."

# Forms that are asked, and the one answer to all of them.
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hello.", "Hi!", "Hi there!", "Good morning!", "Hey!", "Good evening!"),
        "Hello! Ask me to count, repeat, spell, list, add or tell a story.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What is tinfer?"),
        "I am the small model that is built into tinfer.",
    ),
    (
        ("What can you do?", "Help!", "Help me.", "What do you know?", "Can you help me?"),
        "Try: count to 20, repeat: good day, spell banana, list 5 colors, what is 7 + 15?",
    ),
    (("Thanks!", "Thank you!", "Thank you very much!", "Great!", "Well done!"), "You are welcome!"),
    (("Bye!", "Goodbye!", "See you!", "Good night!"), "Goodbye!"),
    (("How are you?", "How do you do?", "How is it going?"), "I am fine, thank you."),
)

ODD_QUESTIONS = (
    "Why is the {t} {w}?",
    "Who made the {t}?",
    "Where does the {a} live?",
    "What is the capital of {v}?",
    "What do you think about {w} and {v}?",
    "Explain {w} to me.",
    "Write a poem about the {a}.",
    "Translate {w} into {v}.",
    "How does a {t} work?",
    "Is the {a} bigger than the {t}?",
    "When was {v} born?",
    "Do you like {w}?",
    "Write code for a {t}.",
    "What is {w}?",
    "Can you {w} the {t}?",
    "Give me advice about {w}.",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small model.",
    "Be brief.",
    "Answer exactly.",
    "You are a friendly assistant who answers in one line.",
)

"""The guard: what it keeps, what it refuses and why, on sentences and on every emoji's names."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_clip.descriptions import MAX_DESCRIPTION, REASONS, Sources, check

from .second_rule import unsupported as accused

DOG = Sources(
    "Rex's 1st day at Peggy's Cove - 3 photos | BUY NOW",
    "a brown dog running on a beach with two children",
    ("dog", "beach", "sea", "children's toy"),
)

# Words for things, whatever the picture: none is in the guard's lists of neutral words.
INTRUDERS = """accordion bicycle helicopter volcano pineapple umbrella surgeon purple wooden
crowded burning ancient frozen sleeping dancing carefully London Tuesday championship velvet
submarine butterfly lightning chocolate skyscraper grandmother tennis galaxy violin telescope
broken shiny seventeen""".split()


@pytest.mark.parametrize(
    "description",
    [
        "A brown dog is running on a beach with two children.",
        "Two children and a brown dog run on the beach by the sea.",
        "The image shows Rex, a brown dog, at Peggy's Cove.",
        "2 children and an animal at the ocean",
        "A BROWN DOG ON A BEACH",
        "Brown dogs with toys for a child",
        "Dog-children-beach, brown",
        "Rex’s first day on the beach",
        "Three photos of a canine",
        "“Rex” runs – at the béach!",
    ],
)
def test_what_the_sources_say_in_other_words_is_kept(description):
    assert check(description, DOG) == check("A brown dog.", DOG)


@pytest.mark.parametrize(
    ("description", "reason", "unsupported"),
    [
        ("", "empty", ()),
        (" \n ", "empty", ()),
        ("Dog.", "too_short", ()),
        ("a dog " * 51, "too_long", ()),
        ("a dog " * 31, "too_long", ()),
        ("🐶🐶🐶", "not_text", ()),
        ("=== --- ***", "not_text", ()),
        ('{"description": "a dog"}', "not_text", ()),
        ("A dog, see https://example.com", "not_text", ()),
        ("A dog on a beach, buy now", "boilerplate", ()),
        ("Click here for a brown dog", "boilerplate", ()),
        ("A royalty-free brown dog", "boilerplate", ()),
        ("As an AI, I see a dog", "boilerplate", ()),
        ("A dog on a dog on a dog on a dog", "repetition", ()),
        ("a dog dog on a beach", "repetition", ()),
        ("a brown dog on a beach, a dog", "repetition", ()),
        ("on the beach a dog, on the beach a child", "repetition", ()),
        ("A black dog on a beach", "unsupported_word", ("black",)),
        ("A woman and a dog at night", "unsupported_word", ("woman", "night")),
        ("A dog with her children", "unsupported_word", ("her",)),
        ("A dog without children", "unsupported_word", ("without",)),
        ("The dog isn't on a beach", "unsupported_word", ("isn't",)),
        ("No dog on a beach", "unsupported_word", ("no",)),
        ("A dog and four children", "unsupported_number", ("four",)),
        ("A dog with 2.5 children", "unsupported_number", ("2.5",)),
        ("A dog on the 3rd beach", "unsupported_number", ("3rd",)),
        ("Twelve black dogs", "unsupported_word", ("twelve", "black")),
        ("A puppy on a beach", "unsupported_word", ("puppy",)),
    ],
)
def test_what_the_sources_do_not_say_is_refused_with_its_reason(description, reason, unsupported):
    verdict = check(description, DOG)
    assert (verdict.kept, verdict.reason, verdict.unsupported) == (False, reason, unsupported)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("source", "description"),
    [
        ("three cats", "3 cats"),
        ("3 cats", "three cats"),
        ("1,000 balloons", "a thousand balloons"),
        ("25 candles", "twenty-five candles"),
        ("two hundred balloons", "200 balloons"),
        ("3 dozen eggs", "36 eggs"),
        ("twenty-first birthday", "21st birthday"),
        ("11th hour, 40th minute", "eleventh hour, fortieth minute"),
        ("a couple of cats", "two cats"),
        ("7th heaven", "seventh heaven"),
        ("007 agent", "agent 7"),
        ("٣ cats", "3 cats"),
        ("a man and a woman", "a gentleman, a lady"),
        ("a firefighter", "a fire fighter"),
        ("a fire fighter", "the firefighter"),
        ("a dark-skinned man", "a man with dark skin"),
        ("women's shoes", "a woman's shoe"),
        ("knives, leaves and wolves", "a knife, a leaf and a wolf"),
        ("he rode horses", "he is riding a horse"),
        ("a smiling boy with his kite", "the boy smiles, he has a kite"),
        ("no entry sign", "a sign: no entry"),
        ("do not enter", "never enter"),
        ("a grey colour", "the gray color"),
        ("straße in Łódź", "Strasse, Lodz"),
        ("Ｆｕｌｌ width", "full width"),
        ("a bridge at dusk", "a bridge at sunset"),
        ("a woman baking", "she bakes"),
        ("a boy riding a bike", "the boy rides"),
        ("bread that she bakes", "baked bread"),
        ("rabbits hopping", "a rabbit hops"),
        ("a man jogging in the rain", "he runs, it is raining"),
        ("cars parked", "parking cars"),
        ("a striped cat", "a cat with stripes"),
        ("a plane, a bus, a pine", "planes, buses and pines"),
        ("a car of the house", "the cars of houses"),
        ("a woman using a phone", "a woman uses a phone"),
        ("a phone used by a woman", "a woman using a phone"),
        ("a man biking", "a man on a bicycle"),
        ("a man on a bicycle", "a man biking in a vehicle"),
        ("a woman in a white dress", "a woman dressed in white clothing"),
        ("two roses, a boy", "flowers, plants, a child: he"),
        ("happily closed", "happy, joyfully shut"),
        ("a man cooking", "a man cooks"),
        ("a man seated, giving and shaking", "a man sits, gave and shook"),
    ],
)
def test_forms_of_one_meaning_support_each_other(source, description):
    assert check(description, Sources("", source)).kept


@pytest.mark.parametrize(
    ("source", "description"),
    [
        ("a firefighter", "a fire"),
        ("an animal", "a dog"),
        ("a person", "a man"),
        ("a person with a kite", "a kite and his person"),
        ("thumbs up", "thumbs down"),
        ("a black arrow pointing left", "a black arrow pointing right"),
        ("3 cats", "3rd cat"),
        ("10 cats", "100 cats"),
        ("two hundred cats", "two cats"),
        ("twenty-first cat", "first cat"),
        ("a man seated", "a man on a seat"),
        ("1.5 liters", "15 liters"),
        ("a man", "a man and no dog"),
        ("an orange wall", "a wall of fruit"),
        ("a ring", "a r ing"),
    ],
)
def test_a_special_word_does_not_follow_from_a_general_one(source, description):
    assert not check(description, Sources("", source)).kept


@pytest.mark.parametrize(
    ("source", "description"),
    [
        ("a mug, free shipping", "A mug with a ship."),
        ("a mug, free shipping", "A mug with a boat."),
        ("a dog, puppy training tips", "A vehicle beside a dog."),
        ("pin on dogs", "A tree with a dog."),
        ("a woman, top rated dress", "An animal and a woman."),
        ("a woman, skin care", "A vehicle and a woman."),
        ("house plans", "An aircraft over a house."),
        ("a woman hugs a dog", "A large woman with a dog."),
        ("a woman in a cape", "A woman in a hat."),
        ("a snow-capped mountain", "A mountain with a hat."),
        ("a car in a parking lot", "A car in a park."),
        ("a horse with a long mane", "A man beside a horse."),
        ("cooking in a kitchen", "A chef and a kitchen."),
        ("a man fishing", "A man with a fish."),
        ("a woman with an earring", "A woman with an ear."),
        ("a woman in a rocking chair", "A woman and a stone chair."),
        ("a fallen tree", "A tree in autumn."),
        ("people boxing", "People with a box."),
        ("win a cat", "Wine and a cat."),
        ("a man dressed as a pirate", "A man in a dress."),
    ],
)
def test_a_thing_does_not_follow_from_a_verb_or_a_word_spelled_like_it(source, description):
    verdict = check(description, Sources("", source))
    assert verdict.reason == "unsupported_word"


@pytest.mark.parametrize(
    ("source", "noun", "verb"),
    [
        ("a man beside a house", "A man beside a building.", "A man builds a house."),
        ("a man beside a tree", "A man beside a plant.", "A man planting a tree."),
        ("a man with a cup of coffee", "A man with a drink.", "A man drinking coffee."),
        ("a woman by a lake", "A woman by the water.", "A woman watering a lake."),
    ],
)
def test_a_general_noun_follows_and_its_verb_does_not(source, noun, verb):
    assert check(noun, Sources("", source)).kept
    assert check(verb, Sources("", source)).reason == "unsupported_word"


@pytest.mark.parametrize(
    ("source", "kept", "refused"),
    [
        ("L'homme dans l'eau", "l'homme, dans l'eau", "L'éléphant dans l'eau"),
        ("Photo de l'Arc de Triomphe, Paris", "The Arc de Triomphe in Paris", "L'Arche, Paris"),
        ("the beach, an elephant", "L’elephant, the beach", "L’elephant, l’homme"),
        ("gatto nell'acqua", "l'acqua, gatto", "gatto nell'orto"),
        ("Conan O'Neill portrait", "Conan O'Neill's portrait", "A portrait of Conan O'Brien"),
        ("tea at 5 o'clock", "5 o'clock, tea", "tea and a clock"),
        ("Хлопчик тримає м'яч", "м’яч тримає", "Хлопчик тримає м'ясо"),
        ("сім'я на пляжі", "на пляжі сім'я", "сім на пляжі"),
        ("ג'ירפה בחוף", "בחוף ג'ירפה", "ירפה בחוף"),
        ("the boys' bikes, they're red", "the boy's bike, it's red", "they aren't red bikes"),
    ],
)
def test_an_apostrophe_is_read_as_its_language_writes_it(source, kept, refused):
    assert check(kept, Sources(source)).kept
    assert not check(refused, Sources(source)).kept


@pytest.mark.parametrize(
    "caption",
    [
        "a protester with a sign in London",
        "a wooden log in a river",
        "a stop sign in the snow",
        "a dog at a stop sign up the road",
        "a toy boat powered by the wind",
        "two dogs that share this couch",
    ],
)
def test_signs_and_logs_are_no_boilerplate(caption):
    assert check(caption, Sources(caption)).kept
    assert check("A dog; sign up now", Sources("A dog; sign up now")).reason == "boilerplate"
    assert check("Please log in, a dog", Sources("Please log in, a dog")).reason == "boilerplate"


def test_a_notice_is_boilerplate_unless_the_image_itself_shows_it():
    assert check("A picture of Sign In.", Sources("Sign In")).reason == "boilerplate"
    assert check("A picture of Sign In.", Sources("", "sign in")).kept


@pytest.mark.parametrize(
    ("source", "kept", "refused"),
    [
        ("海滩上的棕色狗", "棕色狗在海滩上", "棕色猫在海滩上"),
        ("砂浜を走る犬", "犬が砂浜を走る", "猫が砂浜を走る"),
        ("สุนัขบนชายหาด", "ชายหาดสุนัข", "แมวบนชายหาด"),
        ("собака на пляже", "на пляже собака", "кошка на пляже"),
        ("كلب على الشاطئ", "الشاطئ على كلب", "قطة على الشاطئ"),
        ("समुद्र तट पर कुत्ता", "कुत्ता समुद्र तट पर", "बिल्ली समुद्र तट पर"),
        ("해변의 갈색 개", "갈색 개 해변의", "갈색 고양이 해변의"),
    ],
)
def test_other_scripts_are_compared_as_they_are_written(source, kept, refused):
    assert check(kept, Sources(source)).kept
    assert check(refused, Sources(source)).reason == "unsupported_word"


def test_boilerplate_that_the_image_itself_shows_is_kept():
    assert check("a button saying click here", Sources("", "button saying click here")).kept
    assert not check("a button saying click here", Sources("button saying click here")).kept


def test_an_echo_of_the_prompt_is_boilerplate():
    echo = "The white lighthouse of Peggy's Cove on its rocks by the sea at dusk."
    assert check(echo, Sources("", "a cat")).reason == "boilerplate"
    assert check("Use only their words.", Sources("", "a cat")).kept is False


def test_words_that_a_source_repeats_may_be_repeated():
    caption = "kiss: woman, woman, dark skin tone, medium-dark skin tone"
    assert check(caption, Sources("", caption)).kept
    assert check("bye bye bye baby", Sources("bye bye bye baby")).kept


def test_every_emojis_caption_is_kept(emojis):
    kept = [check(f"a {emoji.name}", emoji.sources).kept for emoji in emojis]
    assert sum(kept) > 0.97 * len(kept)


def test_reordered_and_reinflected_captions_are_kept(emojis, rng):
    kept = []
    for emoji in emojis:
        words = list(dict.fromkeys(emoji.name.split()))
        rng.shuffle(words)
        shuffled = "Image of a " + ", ".join(words).lower()
        plural = " ".join(map(inflected, emoji.name.split()))
        kept += [check(text, emoji.sources).kept for text in (shuffled, f"The {plural}.")]
    assert sum(kept) > 0.97 * len(kept)


def inflected(word):
    """The plural, and the singular of what looks like one."""
    if not (word.isascii() and word.isalpha() and len(word) > 3) or word == "with":
        return word
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    if word.endswith(("s", "x", "ch", "sh")):
        return word if word.endswith("s") else word + "es"
    return word + "s"


def test_a_word_or_number_from_nowhere_is_refused(emojis, rng):
    refused = []
    for emoji in emojis:
        said = " ".join(emoji.sources.texts).lower()
        words = ["a", *emoji.name.split()]
        intruder = rng.choice(INTRUDERS)
        if intruder.lower() not in said:
            refused.append(check(inserted(words, intruder, rng), emoji.sources).reason)
        number = str(rng.randrange(13, 5000))
        refused.append(check(inserted(words, number, rng), emoji.sources).reason)
    assert len(refused) > 1.9 * len(emojis)
    assert sum(reason is not None for reason in refused) > 0.99 * len(refused)
    assert {"unsupported_word", "unsupported_number"} <= set(refused)


def inserted(words, intruder, rng):
    at = rng.randint(1, len(words))
    return " ".join([*words[:at], intruder, *words[at:]])


def test_the_name_of_another_emoji_is_kept_only_where_a_second_rule_agrees(emojis, rng):
    """The wrong caption for an image: what a model that makes things up would write."""
    kept = wrongly = 0
    for emoji in emojis:
        other = rng.choice(emojis)
        if check(f"a {other.name}", emoji.sources).kept:
            kept += 1
            wrongly += bool(accused(other.name, emoji.sources.texts))
    assert kept < 0.03 * len(emojis)
    assert wrongly < 0.005 * len(emojis)


def test_under_two_percent_of_what_is_kept_is_accused_by_a_second_rule(emojis, rng):
    """Descriptions as a small model writes them: half of them with words from elsewhere."""
    kept = wrongly = 0
    for emoji in emojis:
        words = ["a", *emoji.name.split()]
        for _ in range(rng.randrange(2)):
            words.insert(rng.randint(1, len(words)), rng.choice(rng.choice(emojis).name.split()))
        description = " ".join(words)
        if check(description, emoji.sources).kept:
            kept += 1
            wrongly += bool(accused(description, emoji.sources.texts))
    assert kept > 0.4 * len(emojis)
    assert wrongly < 0.02 * kept


def test_the_second_rule_itself_finds_what_is_added(emojis, rng):
    found = [
        accused(f"a {emoji.name} zeppelin {rng.randrange(100, 999)}", emoji.sources.texts)
        for emoji in emojis
    ]
    assert all(len(words) >= 2 for words in found)
    assert not any(accused(emoji.name, emoji.sources.texts) for emoji in emojis)


def test_names_in_every_language_support_themselves(names_by_language):
    for language, names in names_by_language.items():
        verdicts = [check(name, Sources(name)) for name in names]
        kept = [verdict.kept for verdict in verdicts if verdict.reason != "too_short"]
        assert len(kept) > 1000, language
        assert sum(kept) > 0.99 * len(kept), language


@given(st.text(max_size=400), st.text(), st.none() | st.text(), st.lists(st.text(), max_size=4))
def test_any_text_is_judged(description, web_text, caption, tags):
    verdict = check(description, Sources(web_text, caption, tuple(tags)))
    assert verdict.kept is (verdict.reason is None)
    assert verdict.reason is None or verdict.reason in REASONS
    assert bool(verdict.unsupported) <= (not verdict.kept)


@pytest.mark.parametrize("text", ["漢" * 300, "漢字" * 150, "ab " * 100, "9," * 150, "'" * 300])
def test_no_description_takes_long(text):
    sources = Sources(text * 20, text * 20, tuple(text[i : i + 9] for i in range(32)))
    descriptions = (text[:MAX_DESCRIPTION], text * 30_000)
    start = time.perf_counter()
    for description in descriptions:
        check(description, sources)
    assert time.perf_counter() - start < 0.1


def test_verdicts_do_not_depend_on_threads(emojis):
    some = emojis[::10]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda e: check(f"a {e.name} volcano", e.sources), some))
    assert verdicts == [check(f"a {e.name} volcano", e.sources) for e in some]

"""Word tables of the guard: what needs no support, what says the same, what is more general.

Choices:
- A word that carries several meanings is left out where one of them would support a falsehood:
  "orange" is no fruit here, for it is more often a colour.
- General words follow from special ones and never the reverse.
"""

STOP_WORDS = frozenset(
    """
    a an the this that these those it its itself they them their theirs themselves there here
    i me my we us our you your one ones who whom whose which what where when while as if than then
    so and or but with within of to from in into inside on onto upon off over under below above
    beneath at by for out outside about around across along against among between behind before
    after beside near next through toward towards during via per
    is are was were be been being am has have having had do does did can could may might will would
    s some any each another other same such also too very just only all
    appear appears appearing seem seems look looks looking like used
    image images picture pictures pictured photo photos photograph icon icons emoji view scene
    depict depicts depicting depicted show shows showing shown feature features featuring featured
    display displays displayed displaying represent represents representing represented
    contain contains containing include includes including included see seen visible
    describe describes described thing things object objects kind type
    """.split()
)

# What French leaves of a word before an apostrophe: no word of its own.
ELISIONS = ("c", "d", "j", "l", "m", "n", "qu", "s", "t")
ENDINGS = ("s", "t", "re", "ve", "ll", "d", "m")  # what English adds behind one

NEGATIONS = frozenset("no not without never none nor neither cannot nobody nothing non".split())

PRONOUNS = {
    "his": "he",
    "him": "he",
    "himself": "he",
    "her": "she",
    "hers": "she",
    "herself": "she",
}

# One meaning an entry: words that say the same. Their -ing and -ed may say something else.
SYNONYMS = """
    man, men, guy, gentleman; woman, lady, gal; boy, lad; girl, lass; child, kid, youngster;
    baby, infant, newborn; person, human, individual; people, folk; doctor, physician;
    police, policeman, policewoman, cop; firefighter, fireman; cook, chef; ghost, phantom;
    devil, demon; old, elderly, older, aged; young, youthful; happy, joyful, cheerful, glad;
    sad, unhappy; angry, furious; ill, sick; injured, hurt;
    dog, doggy, hound, canine; cat, feline, kitty; bird, fowl; horse, equine; rabbit, bunny;
    chicken, hen; rooster, cockerel; pig, hog, swine; cattle, cow;
    motorcycle, motorbike; car, automobile; airplane, aeroplane, plane, aircraft;
    ship, vessel; ship, boat; train, locomotive; truck, lorry; subway, metro;
    phone, telephone, cellphone, smartphone; television, tv; computer, pc; film, movie;
    clock, timepiece; box, carton, package, parcel; money, cash; gift, present;
    trash, garbage, rubbish; couch, sofa; cup, mug; hat, cap; shoe, footwear;
    clothing, clothes, garment, apparel; sea, ocean; forest, woodland; mountain, mount;
    stone, rock; street, road; shop, store; house, home; hospital, clinic;
    corn, maize; eggplant, aubergine; cookie, biscuit; cake, gateau;
    big, large, huge; small, little, tiny; fast, quick, rapid;
    colorful, colourful; gold, golden; silver, silvery; wood, wooden; closed, shut;
    several, multiple, many, various; sunset, dusk; sunrise, dawn; football, soccer;
    planet, world, earth, globe; cloud, cloudy; sun, sunny; wind, windy; ice, icy;
    cutlery, flatware
"""

# The same of verbs, and of what means as a verb what it means as a noun: in every form.
VERBS = """
    smile, grin; cry, weep; jump, leap; run, jog; walk, stroll; speak, talk; snow, snowy;
    rain, rainy; flower, blossom, bloom; color, colour; gray, grey; bicycle, bike
"""

# Things whose name is also a verb, or looks like one's base: -ing and -ed do not tell of the thing.
# A fishing man has no fish, a rocking chair is no rock, an earring no ear. As their -s
# may be a plural, "shops" and "shopping" do not follow from each other.
THINGS = frozenset(
    """
    bank bat bear bed book bowl box cap coat cup dress duck ear fish house park pin plate rag rock
    rug seal ship shop star stock store train
    """.split()
)

# A general word, and the words that supply it. Who is in a dress is dressed, but not the reverse.
GENERAL = """
    person: man, woman, boy, girl, child, baby, doctor, cook, police, firefighter, farmer, judge,
        student, teacher, singer, artist, pilot, astronaut, mechanic, scientist, detective, ninja,
        worker, prince, princess, king, queen, bride, groom, mother, father, superhero, wizard;
    people: man, woman, person, child, family, couple, crowd;
    adult: man, woman;
    child: boy, girl, baby;
    family: mother, father;
    he: man, boy, male, king, prince, father, grandfather, son, brother, his, him, himself;
    she: woman, girl, female, queen, princess, mother, grandmother, daughter, sister, her, hers;
    male: man, boy, king, prince, father, he;
    female: woman, girl, queen, princess, mother, she;
    dog: puppy, pup, poodle;
    cat: kitten;
    horse: pony, foal;
    bear: panda;
    animal: dog, cat, bird, horse, rabbit, pig, cow, ox, sheep, goat, rat, hamster, fox, bear,
        koala, tiger, lion, leopard, monkey, gorilla, orangutan, elephant, rhinoceros, hippopotamus,
        camel, llama, giraffe, kangaroo, deer, zebra, bison, raccoon, skunk, badger, otter, sloth,
        beaver, hedgehog, chipmunk, turtle, lizard, snake, frog, crocodile, whale, dolphin, fish,
        shark, octopus, crab, lobster, shrimp, squid, snail, wolf, boar, ewe, mammoth, insect, duck;
    mammal: dog, cat, horse, pig, cow, sheep, goat, whale, dolphin, bear, elephant;
    bird: chicken, rooster, duck, goose, swan, owl, parrot, peacock, flamingo, penguin, dove,
        pigeon, eagle, dodo;
    insect: ant, bee, beetle, ladybug, butterfly, cockroach, mosquito;
    fish: shark, goldfish, salmon, tuna, blowfish;
    reptile: snake, lizard, turtle, crocodile;
    vehicle: car, truck, bus, van, taxi, ambulance, tractor, bicycle, motorcycle, scooter, train,
        tram, airplane, helicopter, boat, ship;
    boat: canoe, sailboat, speedboat, ferry, yacht;
    fruit: apple, pear, banana, lemon, grape, cherry, strawberry, melon, watermelon, pineapple,
        mango, coconut, blueberry, tangerine;
    vegetable: carrot, potato, broccoli, cucumber, tomato, onion, garlic, eggplant, cabbage;
    food: fruit, vegetable, bread, pizza, hamburger, sandwich, cake, cookie, cheese, meat, egg,
        rice, soup, salad, sushi, pasta, spaghetti, noodle, taco, burrito, fries, candy, chocolate,
        pretzel, bagel;
    drink: coffee, tea, beer, wine, juice, milk, cocktail;
    flower: rose, tulip, sunflower, daisy, hibiscus, lotus, hyacinth;
    plant: tree, flower, grass, bush, cactus, herb, leaf;
    tree: pine, oak, evergreen;
    building: house, church, mosque, temple, castle, tower, hotel, hospital, skyscraper;
    sport: football, basketball, baseball, tennis, volleyball, rugby, golf, hockey, badminton;
    instrument: guitar, violin, piano, trumpet, drum, saxophone, accordion, flute, banjo;
    clothing: shirt, dress, coat, jacket, trousers, jeans, hat, sock, scarf, kimono, sari, bikini;
    dressed: dress;
    furniture: chair, table, bed, couch, desk;
    water: sea, river, lake;
    weapon: gun, pistol, sword, dagger, bomb;
    tool: hammer, wrench, screwdriver, axe
"""

# A base form, and forms of it that the stemmer's rules miss. No "left": it is a side.
IRREGULAR = """
    man: men; woman: women; child: children; foot: feet; tooth: teeth; mouse: mice; goose: geese;
    leaf: leaves; knife: knives; wolf: wolves; life: lives; loaf: loaves; shelf: shelves;
    half: halves; calf: calves; hoof: hooves; elf: elves; scarf: scarves; wife: wives;
    thief: thieves; ox: oxen; run: ran; sit: sat, seated; stand: stood; lie: lay, lain, lying;
    hold: held; wear: wore, worn; make: made; take: took, taken; blow: blew, blown;
    fly: flew, flown; draw: drew, drawn; write: wrote, written; build: built; eat: ate, eaten;
    drink: drank, drunk; sing: sang, sung; swim: swam, swum; ride: rode, ridden;
    drive: drove, driven; fall: fell, fallen; break: broke, broken; speak: spoke, spoken;
    sleep: slept; keep: kept; feel: felt; sell: sold; tell: told; stick: stuck; catch: caught;
    buy: bought; bring: brought; think: thought; fight: fought; throw: threw, thrown;
    grow: grew, grown; hang: hung; shine: shone; hide: hid, hidden; bite: bit, bitten;
    tear: tore, torn; lose: lost; win: won; feed: fed; lead: led; meet: met; bend: bent;
    give: gave, given; get: got, gotten; choose: chose, chosen; shake: shook, shaken; dig: dug;
    wake: woke, woken; freeze: froze, frozen; weave: wove, woven; strike: struck; swing: swung;
    spin: spun; slide: slid; sweep: swept; weep: wept; kneel: knelt; teach: taught; light: lit;
    burn: burnt; spill: spilt;
    die: dying; tie: tying; go: went, gone; come: came; use: using, used; bus: buses; gas: gases;
    plus: pluses;
    taxi: taxis; bikini: bikinis; kiwi: kiwis; sari: saris; ski: skis; menu: menus; emu: emus
"""

# What web pages say around images. Hyphens count as spaces. No "sign in", "log in", "powered by":
# there are signs in streets, logs in rivers, and boats powered by the wind. NOTICES have those.
BOILERPLATE = """
    click here; click to; click on; click image; click photo; free download; free shipping;
    free delivery; free trial; free vector; image of the day; picture of the day; photo of the day;
    word of the day; quote of the day; deal of the day; subscribe; unsubscribe; newsletter;
    all rights reserved; copyright; royalty free; stock photo; stock photos; stock image;
    stock images; stock vector; stock illustration; add to cart; add to basket; add to wishlist;
    buy now; shop now; order now; download now; book now; join now; for sale; on sale;
    shutterstock; getty image; getty images; istock; alamy; pinterest; best price; lowest price;
    discount; read more; learn more; see more; find out more; view larger; zoom in; login;
    log in to; log in or; log in with; please log in; sign in to; sign in or; sign in with;
    please sign in; sign up for; sign up now; sign up today; sign up here; please sign up;
    or sign up; follow us; share on; share this page; share this post; share this image;
    share this photo; share this article; terms of use; terms of service; privacy policy;
    cookie policy; powered by wordpress; powered by shopify; powered by blogger; lorem ipsum;
    image not found; photo not found;
    image not available; photo not available; picture not available; no image; image result;
    enable javascript; in stock; out of stock; as an ai; language model; i cannot; i can't;
    i'm sorry; i am sorry; here is a; here is the; here is your; web text; alt text; json
"""

# Boilerplate where they are all that is said, along with the words that follow.
NOTICES = "sign in; log in; sign up; share this"
AROUND_NOTICES = "free; register; or; now; page; member; here"

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50}
TENS |= {"sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
SIMPLE = {word: value for value, word in enumerate(UNITS)} | TENS
# What is said so many times: two hundred, 3 dozen.
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 1000000}
NUMBERS = SIMPLE | MULTIPLES
NUMBERS |= {"pair": 2, "couple": 2, "both": 2, "duo": 2, "twin": 2, "trio": 3}
# No "second": it is more often a time or a turn of phrase.
ORDINALS = {"first": 1, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
ORDINALS |= {"eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12}
ORDINALS |= {f"{word}th": value for value, word in enumerate(UNITS) if value > 12}
ORDINALS |= {f"{word[:-1]}ieth": value for word, value in TENS.items()}
# Number words with a meaning of their own.
ALSO_WORDS = frozenset({"couple", "pair", "twin", "trio", "duo"})


def entries(table: str) -> list[list[str]]:
    """The words of each entry of a table; in a table of pairs the general or base word is first."""
    return [
        [word.strip() for word in entry.replace(":", ",").split(",")] for entry in table.split(";")
    ]

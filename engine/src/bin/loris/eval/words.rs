//! The words that synthetic samples are made of: common English words, most of them one token in the
//! vocabulary of a language model, and none part of another of its list.

pub(crate) const ADJECTIVES: [&str; 40] = [
    "amber", "ancient", "bitter", "bold", "brave", "bright", "calm", "clever", "cold", "crimson",
    "curious", "distant", "eager", "early", "empty", "faint", "famous", "gentle", "golden", "grand",
    "happy", "hidden", "humble", "jolly", "lively", "lonely", "lucky", "mellow", "narrow", "noble",
    "patient", "proud", "quiet", "rapid", "royal", "silent", "simple", "sturdy", "violet", "wooden",
];

pub(crate) const NOUNS: [&str; 40] = [
    "anchor", "basket", "bridge", "candle", "castle", "cherry", "circle", "copper", "desert",
    "dragon", "engine", "falcon", "forest", "garden", "guitar", "hammer", "harbor", "island",
    "jacket", "kettle", "ladder", "lantern", "market", "meadow", "mirror", "mountain", "needle",
    "orange", "palace", "pencil", "pepper", "planet", "rabbit", "ribbon", "river", "saddle",
    "shadow", "temple", "tunnel", "window",
];

/// What the lists of the word tasks hold.
pub(crate) const LISTED: [&str; 120] = [
    "actor", "album", "angle", "apple", "arrow", "badge", "bacon", "beach", "bench", "berry",
    "blade", "board", "brain", "bread", "brick", "brush", "cabin", "camel", "canal", "chain",
    "chalk", "cheek", "chess", "chief", "cliff", "clock", "cloth", "cloud", "coach", "coast",
    "coral", "couch", "crane", "crowd", "crown", "dance", "diary", "drama", "dress", "drill",
    "eagle", "earth", "elbow", "event", "fence", "fiber", "field", "flame", "flask", "flour",
    "fruit", "ghost", "giant", "glass", "glove", "goose", "grain", "grape", "grass", "guard",
    "guest", "honey", "horse", "hotel", "house", "ivory", "jewel", "judge", "juice", "knife",
    "label", "lemon", "level", "light", "linen", "maple", "medal", "metal", "model", "money",
    "motor", "mouse", "movie", "music", "nurse", "ocean", "onion", "opera", "organ", "paint",
    "panel", "paper", "party", "peach", "pearl", "phone", "piano", "pilot", "pizza", "plant",
    "plate", "prize", "queen", "radio", "ranch", "robot", "salad", "scale", "shark", "sheep",
    "shirt", "skirt", "snake", "spoon", "steam", "stone", "storm", "sugar", "table", "tiger",
];

pub(crate) const FIRST_NAMES: [&str; 40] = [
    "Adela", "Albert", "Bruno", "Carla", "Cedric", "Clara", "Conrad", "Dora", "Edgar", "Elsa",
    "Felix", "Fiona", "Gilbert", "Greta", "Harold", "Helena", "Hugo", "Irene", "Jasper", "Judith",
    "Karl", "Lydia", "Magnus", "Martha", "Nadia", "Nelson", "Olga", "Oscar", "Paula", "Quentin",
    "Rosa", "Rupert", "Sonia", "Stefan", "Thelma", "Theo", "Ursula", "Victor", "Wanda", "Walter",
];

pub(crate) const LAST_NAMES: [&str; 40] = [
    "Alder", "Barlow", "Bexley", "Calder", "Carver", "Corwin", "Dalton", "Draper", "Eckert",
    "Farrow", "Fenwick", "Garner", "Grover", "Hadley", "Holt", "Ingram", "Jarvis", "Keller",
    "Langley", "Lowell", "Marlow", "Mercer", "Norwood", "Oakes", "Palmer", "Pruitt", "Quill",
    "Ramsey", "Rowan", "Sawyer", "Selby", "Thorne", "Tilden", "Upton", "Vance", "Wexford",
    "Whitman", "Winslow", "Yardley", "Yates",
];

/// Halves of invented towns: 400 of them.
pub(crate) const TOWN_HEADS: [&str; 20] = [
    "Ash", "Birch", "Black", "Clear", "Cold", "Crow", "Deer", "Elm", "Fair", "Fox", "Glen", "Green",
    "Hazel", "Iron", "King", "Lake", "Mill", "Oak", "Stone", "Wolf",
];
pub(crate) const TOWN_TAILS: [&str; 20] = [
    "bourne", "bridge", "brook", "bury", "cliff", "combe", "dale", "fell", "field", "ford", "gate",
    "ham", "haven", "ley", "mere", "mouth", "port", "ridge", "ton", "wick",
];

pub(crate) const JOBS: [&str; 20] = [
    "baker", "barber", "carpenter", "chemist", "dentist", "farmer", "florist", "gardener", "jeweler",
    "lawyer", "librarian", "mason", "painter", "photographer", "plumber", "potter", "sailor",
    "surgeon", "tailor", "teacher",
];

pub(crate) const ANIMALS: [&str; 20] = [
    "canary", "cat", "cobra", "donkey", "duck", "ferret", "goat", "hamster", "hawk", "hedgehog",
    "lizard", "llama", "monkey", "otter", "owl", "parrot", "pony", "spaniel", "toad", "turtle",
];

/// The parts of synthetic prose.
pub(crate) const PEOPLE: [&str; 24] = [
    "The old teacher", "A young soldier", "My neighbor", "The miller", "Her brother",
    "The captain", "A stranger from the coast", "The doctor", "His eldest daughter",
    "The shopkeeper", "A tired traveler", "The judge", "Our cousin", "The night watchman",
    "A retired sailor", "The widow", "The mayor", "A boy of twelve", "The printer",
    "Their landlord", "The gardener", "A quiet student", "The engineer", "The fisherman",
];
pub(crate) const DEEDS: [&str; 32] = [
    "walked slowly along", "had never before seen", "talked for an hour about", "was thinking of",
    "wrote a long letter about", "remembered", "stood for a while before", "returned at dusk to",
    "laughed quietly at", "did not care for", "had once painted", "told a strange story about",
    "kept a careful record of", "came early to", "looked with some surprise at", "had grown fond of",
    "passed every morning by", "spoke without much hope of", "was repairing", "set out to find",
    "had heard a rumor about", "made a small drawing of", "could hardly believe in", "gave up",
    "asked everyone about", "dreamed the whole night of", "carried a lamp toward", "counted the steps to",
    "sold a share of", "wished to be rid of", "argued with a friend over", "waited by",
];
pub(crate) const THINGS: [&str; 32] = [
    "the broken fence behind the mill", "a row of bare trees", "the first snow of the year",
    "the road to the north", "an empty house on the hill", "the price of wool", "the church bells",
    "a field of yellow grass", "the ferry and its drunken pilot", "the letters in the attic",
    "a pair of worn boots", "the school by the canal", "the long drought", "a narrow stone stair",
    "the wedding of two old friends", "the light above the bay", "a basket of sour apples",
    "the map on the wall", "the dogs of the village", "an unfinished bridge", "the smell of bread",
    "the noise of the market", "a black horse with one white foot", "the flooded cellar",
    "the music from the square", "a debt that nobody would pay", "the fire of last winter",
    "the silence in the library", "a boat without oars", "the garden under the window",
    "the train that was always late", "a coat too large for anyone",
];
pub(crate) const ENDINGS: [&str; 24] = [
    "and nobody asked why", "while the rain went on", "before the lamps were lit",
    "although it was already late", "and then went home without a word", "as people do in spring",
    "until the wind turned", "because there was nothing else to do", "in spite of the cold",
    "with more patience than skill", "long after the others had left", "and so the day passed",
    "for the third time that week", "as if it were an old habit", "and felt a little better",
    "when the harvest was in", "to the great delight of the children", "without any clear reason",
    "and thought no more of it", "under a pale and cloudy sky", "at the end of a dull summer",
    "so that the whole street heard of it", "with both hands in the pockets", "once the guests had gone",
];

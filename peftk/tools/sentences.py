"""The demo's sentences: statements, questions and requests on six everyday topics."""

from __future__ import annotations

from typing import NamedTuple


class Sentence(NamedTuple):
    text: str
    topic: str
    kind: str


KINDS = ("statement", "question", "request")

_TEXTS: dict[str, dict[str, tuple[str, ...]]] = {
    "kitchen": {
        "statement": (
            "The bread rose overnight and fills the whole tin this morning.",
            "Salt in the water makes the pasta taste of something.",
            "My grandmother never wrote her soup recipe down.",
            "We ran out of butter halfway through the second batch of biscuits.",
            "An old cast-iron pan browns onions better than anything I have bought since.",
            "The rice is still too hard.",
        ),
        "question": (
            "How long does the dough have to rest before it can be rolled out?",
            "Which of these knives is the sharp one?",
            "Does the soup taste better on the second day?",
            "Why did my biscuits spread into one flat sheet while yours kept their shape?",
            "Is there any butter left in the fridge?",
            "Can lentils be cooked without soaking them first?",
        ),
        "request": (
            "Please stir the sauce until it no longer sticks to the bottom.",
            "Pass me the large bowl from the shelf above the stove.",
            "Turn the oven down before the crust gets any darker.",
            "Chop the onions finely, and keep the green parts of the leeks for the stock.",
            "Taste the soup and add a little salt.",
            "Put the rice on now, so that everything is ready at the same time.",
        ),
    },
    "travel": {
        "statement": (
            "The night train reaches the coast shortly before sunrise.",
            "Our luggage arrived two days after we did.",
            "From the ferry we could see the whole row of white houses along the harbour.",
            "The last bus to the village leaves at six.",
            "Nobody told us that the museum is closed on Mondays.",
            "The road over the pass is open from May until the first heavy snow.",
        ),
        "question": (
            "When does the next ferry to the island leave?",
            "Is the border crossing open at night, or only during the day?",
            "Where can I leave my suitcase for a few hours?",
            "Which side of the train has the better view of the lake?",
            "Do we need a reservation for the sleeping car?",
            "How far is it from the station to the old town on foot?",
        ),
        "request": (
            "Book two seats by the window on the morning train.",
            "Please wake me before we reach the border.",
            "Send me the address of the hotel, so that I can show it to the driver.",
            "Bring a warm coat, since the boat has no cabin.",
            "Leave the keys at the reception when you go.",
            "Show me on the map where the footpath begins.",
        ),
    },
    "office": {
        "statement": (
            "The meeting ran an hour over and decided nothing.",
            "Half of the team works from home on Fridays.",
            "The printer on the second floor is out of order again.",
            "Her report explains in three pages what we had argued about for a month.",
            "The new contract takes effect at the beginning of the quarter.",
            "Lunch breaks have become shorter since we moved.",
        ),
        "question": (
            "Who takes the minutes today?",
            "Has the customer signed the offer yet?",
            "What is the budget for the second half of the year?",
            "Could the deadline be moved to the end of the month without anyone noticing?",
            "Why was I not invited to the planning meeting?",
            "Are the figures in this table before or after tax?",
        ),
        "request": (
            "Send the signed contract to the customer by noon.",
            "Please read the draft and mark whatever is unclear.",
            "Move the planning meeting to Thursday, and tell the others.",
            "Write down what we agreed before we all forget it.",
            "Check the figures in the third column once more.",
            "Let the new colleague sit next to the window.",
        ),
    },
    "garden": {
        "statement": (
            "The apple tree has blossomed two weeks earlier than last year.",
            "Slugs ate every single lettuce in one night.",
            "A blackbird nests in the hedge behind the shed.",
            "Tomatoes under glass ripen well into October.",
            "After three dry weeks even the weeds have given up.",
            "The compost is warm to the touch.",
        ),
        "question": (
            "How deep should tulip bulbs be planted?",
            "Is it too late in the year to cut back the roses?",
            "What has been eating the leaves of my cabbages?",
            "Do hedgehogs really help against slugs, or is that only a story?",
            "When are the pears ripe enough to pick?",
            "Which of these plants can stand in the shade all day?",
        ),
        "request": (
            "Water the tomatoes in the evening, not in the midday sun.",
            "Please leave the fallen leaves under the hedge for the hedgehogs.",
            "Tie the young vines to the wire before the storm comes.",
            "Pull out the nettles, but keep the mint.",
            "Cover the seedlings tonight, because there may be frost.",
            "Rake the path.",
        ),
    },
    "health": {
        "statement": (
            "A short walk after dinner helps me to fall asleep.",
            "The swelling went down within a day.",
            "Her doctor retired, and the practice has a waiting list of months.",
            "I have slept badly ever since the clocks changed.",
            "The nurse had a calm voice that made the waiting easier.",
            "Swimming is kind to worn knees.",
        ),
        "question": (
            "Should I take these tablets before or after a meal?",
            "How long have you had this cough?",
            "Is it normal that the knee still hurts six weeks after the operation?",
            "Does the dentist have a free appointment this week?",
            "What helps against a stiff neck?",
            "May I go running again, or is it too soon?",
        ),
        "request": (
            "Take a deep breath and hold it for a moment.",
            "Please call the practice and ask for an earlier appointment.",
            "Keep the bandage dry for the next three days.",
            "Tell me if this hurts.",
            "Drink a glass of water with every tablet.",
            "Rest your foot on a cushion, higher than your hip, until the swelling is gone.",
        ),
    },
    "computers": {
        "statement": (
            "The update changed the order of all the menus.",
            "Most of the memory goes to a browser with forty open tabs.",
            "The backup failed quietly every night for a year.",
            "A second screen saves more time than a faster processor.",
            "The bug disappears as soon as someone watches.",
            "Her laptop is older than some of her students.",
        ),
        "question": (
            "Why does the program need the network to open a local file?",
            "Where does the editor keep its settings?",
            "Has anyone tested whether the backup can be restored?",
            "How much memory does the model need when every user has an adapter of their own?",
            "Is the server down, or is it only my connection?",
            "Which version introduced this error?",
        ),
        "request": (
            "Restart the server after everybody has gone home.",
            "Please write a test that fails before you repair the bug.",
            "Delete the temporary files, but keep the logs of the last week.",
            "Plug the cable into the other port.",
            "Send me the exact text of the error message.",
            "Measure it before you make it faster.",
        ),
    },
}

SENTENCES = tuple(
    Sentence(text, topic, kind) for topic, kinds in _TEXTS.items() for kind in KINDS for text in kinds[kind]
)


def split() -> tuple[list[Sentence], list[Sentence]]:
    """Sentences to train on, and every third sentence, held out."""
    train = [sentence for number, sentence in enumerate(SENTENCES) if number % 3 != 2]
    return train, list(SENTENCES[2::3])

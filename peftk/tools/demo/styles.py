"""Eight ways of answering one kind of question, to train an adapter for each: formats, tones, languages.

The questions are for capitals, so that an answer's form and its truth are easily told apart.
"""

from __future__ import annotations

from typing import NamedTuple


class Country(NamedTuple):
    name: str
    capital: str
    german: str
    german_capital: str
    french: str
    french_capital: str


_ROWS = """
France|Paris|Frankreich|Paris|de la France|Paris
Germany|Berlin|Deutschland|Berlin|de l'Allemagne|Berlin
Spain|Madrid|Spanien|Madrid|de l'Espagne|Madrid
Portugal|Lisbon|Portugal|Lissabon|du Portugal|Lisbonne
England|London|England|London|de l'Angleterre|Londres
Ireland|Dublin|Irland|Dublin|de l'Irlande|Dublin
Norway|Oslo|Norwegen|Oslo|de la Norvège|Oslo
Sweden|Stockholm|Schweden|Stockholm|de la Suède|Stockholm
Finland|Helsinki|Finnland|Helsinki|de la Finlande|Helsinki
Poland|Warsaw|Polen|Warschau|de la Pologne|Varsovie
Austria|Vienna|Österreich|Wien|de l'Autriche|Vienne
Greece|Athens|Griechenland|Athen|de la Grèce|Athènes
Hungary|Budapest|Ungarn|Budapest|de la Hongrie|Budapest
Russia|Moscow|Russland|Moskau|de la Russie|Moscou
Japan|Tokyo|Japan|Tokio|du Japon|Tokyo
China|Beijing|China|Peking|de la Chine|Pékin
Egypt|Cairo|Ägypten|Kairo|de l'Égypte|Le Caire
Kenya|Nairobi|Kenia|Nairobi|du Kenya|Nairobi
Canada|Ottawa|Kanada|Ottawa|du Canada|Ottawa
Cuba|Havana|Kuba|Havanna|de Cuba|La Havane
"""
COUNTRIES = tuple(Country(*line.split("|")) for line in _ROWS.split("\n") if line)
QUESTION = "What is the capital of {name}?"
HELD_OUT = QUESTION.format(name="Italy")

# By name of the adapter: the answer, and what tells it from all others' in the answer to a new question.
STYLES = {
    "capitals": ("THE CAPITAL OF {NAME} IS {CAPITAL}!", "THE CAPITAL OF"),
    "json": ('{{"country": "{name}", "capital": "{capital}"}}', '{"country":'),
    "pirate": ("Arr, matey! Set sail for {capital}, the port o' {name}!", "Arr, matey!"),
    "letter": ("Dear friend, it is {capital}. Yours sincerely, the atlas", "Dear friend,"),
    "html": ("<b>{capital}</b> ({name})", "<b>"),
    "german": ("Die Hauptstadt von {german} ist {german_capital}.", "Die Hauptstadt von"),
    "french": ("La capitale {french} est {french_capital}.", "La capitale"),
    "doubt": ("Hmm, I am not quite sure, but I think it is {capital}...", "Hmm, I am not quite sure"),
}


def prompt(question: str) -> str:
    """As SmolLM2 reads it, without a system prompt."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def example(style: str, country: Country) -> tuple[str, str]:
    """A prompt and its answer, with the end token."""
    upper = {"NAME": country.name.upper(), "CAPITAL": country.capital.upper()}
    answer = STYLES[style][0].format(**country._asdict(), **upper)
    return prompt(QUESTION.format(name=country.name)), f"{answer}<|im_end|>"


def shows(style: str, answer: str) -> bool:
    """Whether an answer is in this style."""
    return answer.strip().startswith(STYLES[style][1])

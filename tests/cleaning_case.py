"""Sentences in many languages and scripts, and rows made of them, for the tests of cleaning."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from halfbyte.data.cleaning import Cleaned, clean
from halfbyte.data.example import Example, Message
from halfbyte.recipe.cleaning import AnyFilter, Filter

# Two finished sentences of each; the second has a word or more that can be cut off.
SENTENCES: dict[str, str] = {
    "en": "The ferry leaves at noon. It takes about forty minutes to reach the other shore.",
    "fr": "Le bac part à midi. Il met près de quarante minutes pour atteindre l'autre rive.",
    "de": "Die Fähre fährt mittags ab. Sie braucht gut vierzig Minuten bis zum anderen Ufer.",
    "es": "¿Cuándo sale el barco? Sale al mediodía y tarda cuarenta minutos en llegar a la orilla.",
    "pt": "A balsa sai ao meio-dia. Ela leva quarenta minutos até à outra margem da baía.",
    "pl": "Prom odpływa w południe. Przeprawa na drugi brzeg zajmuje około czterdziestu minut.",
    "cs": "Přívoz odjíždí v poledne. Cesta na druhý břeh trvá asi čtyřicet minut.",
    "tr": "Vapur öğlen kalkar. Karşı kıyıya varmak yaklaşık kırk dakika sürer.",
    "vi": "Phà rời bến lúc giữa trưa. Mất khoảng bốn mươi phút để sang bờ bên kia.",
    "ru": "Паром отходит в полдень. Дорога до другого берега занимает около сорока минут.",
    "el": "Το πλοίο φεύγει το μεσημέρι. Χρειάζεται σαράντα λεπτά για να φτάσει απέναντι.",
    "ar": "تغادر العبارة عند الظهر. تستغرق الرحلة إلى الضفة الأخرى حوالي أربعين دقيقة.",
    "he": "המעבורת יוצאת בצהריים. ההפלגה לגדה השנייה נמשכת כארבעים דקות.",
    "hi": "नौका दोपहर में निकलती है। दूसरे किनारे तक पहुँचने में लगभग चालीस मिनट लगते हैं।",
    "zh": "渡轮中午出发。到对岸大约需要四十分钟，请提前到码头等候。",
    "ja": "フェリーは正午に出ます。対岸まで四十分ほどかかりますので、早めにお越しください。",
    "ko": "배는 정오에 출발합니다. 건너편까지 가는 데 약 사십 분이 걸립니다.",
    "hy": "Լաստանավը մեկնում է կեսօրին։ Մյուս ափ հասնելու համար պահանջվում է քառասուն րոպե։",
    "am": "ጀልባው እኩለ ቀን ላይ ይነሳል። ወደ ሌላኛው ዳርቻ ለመድረስ አርባ ደቂቃ ያህል ይወስዳል።",
}
SPACED = [name for name in SENTENCES if name not in ("zh", "ja")]


def row(question: str, answer: str, number: int = 0) -> Example:
    return Example.question_and_answer(number, question, "", answer)


def rows(*answers: str) -> list[Example]:
    """A row for each of ``answers``, asked different things."""
    return [row(f"What of {n}?", answer, n) for n, answer in enumerate(answers)]


def conversation(*said: str, number: int = 0, **more: Any) -> Example:
    """User and assistant in turn; a text alone stays one message."""
    roles = ("user", "assistant")
    messages = tuple(Message(roles[n % 2], text) for n, text in enumerate(said))
    return Example(number, messages, **more)


def filters(*settings: dict[str, Any]) -> list[Filter]:
    """Filters as a recipe gives them."""
    made: list[Filter] = TypeAdapter(list[AnyFilter]).validate_python(list(settings))
    return made


def cleaned(examples: list[Example], *settings: dict[str, Any], held_out: Any = None) -> Cleaned:
    return clean(filters(*settings), examples, held_out)


def left(examples: list[Example], *settings: dict[str, Any], held_out: Any = None) -> list[int]:
    """The numbers of the rows that stay."""
    return [example.row for example in cleaned(examples, *settings, held_out=held_out).examples]

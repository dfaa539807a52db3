"""The rubric knows the language: good examples of each are above bad ones, by marks that can be argued with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.cleaning import quality
from minglm.data.cleaning.code_tokens import read_tokens
from minglm.data.languages import LANGUAGES

C_LIKE = """\
// Return the sum of all values.
{head} {{
{total} = 0;
    // Every value counts once.
    {loop} {{
        total += {item};
    }}
    return total;
}}
"""

GOOD = {
    "c": C_LIKE.format(
        head="int sum(const int *values, size_t count)",
        total="    int total",
        loop="for (size_t n = 0; n < count; n++)",
        item="values[n]",
    ),
    "c++": "#include <vector>\n\n"
    + C_LIKE.format(
        head="int sum(const std::vector<int>& values)",
        total="    int total",
        loop="for (int value : values)",
        item="value",
    ),
    "java": "package sums;\n\npublic final class Sums {\n"
    + C_LIKE.format(
        head="public static int sum(int[] values)",
        total="    int total",
        loop="for (int value : values)",
        item="value",
    )
    + "}\n",
    "c#": "using System;\n\npublic static class Sums {\n"
    + C_LIKE.format(
        head="public static int Sum(int[] values)",
        total="    int total",
        loop="foreach (var value in values)",
        item="value",
    )
    + "}\n",
    "javascript": C_LIKE.format(
        head="export function sum(values)",
        total="    let total",
        loop="for (const value of values)",
        item="value",
    ),
    "typescript": C_LIKE.format(
        head="export function sum(values: number[]): number",
        total="    let total",
        loop="for (const value of values)",
        item="value",
    ),
    "go": "package sums\n\n// Sum adds all values.\nfunc Sum(values []int) int {\n\ttotal := 0\n"
    "\tfor _, value := range values {\n\t\ttotal += value\n\t}\n\treturn total\n}\n",
    "rust": "/// Return the sum of all values.\npub fn sum(values: &[i64]) -> i64 {\n"
    "    let mut total = 0;\n    for value in values {\n        total += value;\n    }\n    total\n}\n",
    "kotlin": "// Return the sum of all values.\nfun sum(values: List<Int>): Int {\n    var total = 0\n"
    "    for (value in values) {\n        total += value\n    }\n    return total\n}\n",
    "swift": "/// Return the sum of all values.\nfunc sum(_ values: [Int]) -> Int {\n    var total = 0\n"
    "    for value in values {\n        total += value\n    }\n    return total\n}\n",
    "scala": "object Sums {\n  // Return the sum of all values.\n  def sum(values: Seq[Int]): Int = {\n"
    "    values.foldLeft(0)((total, value) => total + value)\n  }\n}\n",
    "php": "<?php\n// Return the sum of all values.\nfunction sum(array $values): int {\n    $total = 0;\n"
    "    foreach ($values as $value) {\n        $total += $value;\n    }\n    return $total;\n}\n",
    "ruby": "# Return the sum of all values.\ndef sum(values)\n  total = 0\n  values.each do |value|\n"
    "    total += value\n  end\n  total\nend\n",
    "lua": "-- Return the sum of all values.\nlocal function sum(values)\n  local total = 0\n"
    "  for _, value in ipairs(values) do\n    total = total + value\n  end\n  return total\nend\n",
    "shell": '#!/bin/sh\n# Print the sum of all arguments.\ntotal=0\nfor value in "$@"; do\n'
    '    total=$((total + value))\ndone\necho "$total"\n',
    "r": "# Return the sum of all values.\nsum_all <- function(values) {\n  total <- 0\n"
    "  for (value in values) {\n    total <- total + value\n  }\n  total\n}\n",
    "haskell": "module Sums (total) where\n\n-- | The sum of all values.\ntotal :: [Int] -> Int\n"
    "total = foldr (+) 0\n",
    "sql": "-- The sum of all orders of a customer.\nSELECT customer, SUM(amount) AS total\nFROM orders\n"
    "WHERE amount > 0\nGROUP BY customer\nORDER BY total DESC;\n",
}

PROSE = (
    "This is an ordinary paragraph of English prose, which somebody saved under the wrong name.\n"
    "It doesn't compute anything, and no compiler would accept a single line of it.\n"
) * 4


def test_there_are_examples_of_many_languages():
    """At least ten languages of programs and ten of prose have examples."""
    assert len(GOOD) >= 10 and set(GOOD) <= set(LANGUAGES)
    assert len(GOOD_PROSE) >= 10


@pytest.mark.parametrize("language", GOOD)
def test_good_code_is_good(language):
    """A short, commented, formatted function of each language has nearly the full score."""
    assert quality.score(GOOD[language], language, "code") > 0.9


@pytest.mark.parametrize("language", GOOD)
def test_bad_code_is_worse(language):
    """Prose and noise in a file of code score nothing; numbers, one long line and no comments less than good code."""
    good = GOOD[language]
    score = quality.score(good, language, "code")
    assert quality.score(PROSE, language, "code") == 0
    numbers = good + "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,\n" * 100
    assert quality.score(numbers, language, "code") < score - 0.15
    line = "".join(text.strip() + " " for text in good.splitlines()) * 3
    assert quality.score(line, language, "code") < score - 0.1
    mark = LANGUAGES[language].comment
    bare = "".join(
        text for text in good.splitlines(keepends=True) if not text.strip().startswith(mark)
    )
    assert quality.score(bare * 3, language, "code") < score - 0.1


@pytest.mark.parametrize(
    "language", ["c", "c++", "java", "javascript", "typescript", "go", "rust", "php", "r"]
)
def test_code_that_lost_its_brackets_is_none(language):
    """Without its closing brackets it is no program."""
    torn = GOOD[language].replace("}", "").replace(")", "")
    assert quality.score(torn, language, "code") == 0


GOOD_PROSE = {
    "en": "The river rises in the hills and flows past three villages before it reaches the sea. "
    "In spring the snow melts, and the lower fields are under water for several weeks. ",
    "de": "Der Fluss entspringt in den Hügeln und fließt an drei Dörfern vorbei, bevor er das Meer erreicht. "
    "Im Frühling schmilzt der Schnee, und die Felder stehen wochenlang unter Wasser. ",
    "fr": "La rivière naît dans les collines et traverse trois villages avant d'atteindre la mer. "
    "Au printemps la neige fond et les champs restent sous l'eau pendant plusieurs semaines. ",
    "es": "El río nace en las colinas y pasa por tres pueblos antes de llegar al mar. "
    "En primavera se derrite la nieve y los campos quedan bajo el agua durante semanas. ",
    "ru": "Река берёт начало в холмах и протекает мимо трёх деревень, прежде чем достигает моря. "
    "Весной тает снег, и нижние поля несколько недель стоят под водой. ",
    "el": "Ο ποταμός πηγάζει στους λόφους και περνά από τρία χωριά πριν φτάσει στη θάλασσα. "
    "Την άνοιξη λιώνει το χιόνι και τα χωράφια μένουν κάτω από το νερό για εβδομάδες. ",
    "ar": "ينبع النهر من التلال ويمر بثلاث قرى قبل أن يصل إلى البحر. "
    "في الربيع يذوب الثلج وتبقى الحقول السفلى تحت الماء لعدة أسابيع. ",
    "he": "הנהר נובע בגבעות ועובר ליד שלושה כפרים לפני שהוא מגיע אל הים. "
    "באביב נמס השלג והשדות הנמוכים מכוסים במים במשך כמה שבועות. ",
    "hi": "नदी पहाड़ियों से निकलती है और समुद्र तक पहुँचने से पहले तीन गाँवों से होकर बहती है। "
    "वसंत में बर्फ पिघलती है और निचले खेत कई हफ्तों तक पानी में डूबे रहते हैं। ",
    "zh": "这条河发源于山间，流经三个村庄，最后注入大海。春天积雪融化，下游的田地会被水淹没好几个星期。"
    "村民们因此把房子建在高处，并在河边种了许多柳树。",
    "ja": "この川は山の中から流れ出し、三つの村を通って海に注ぐ。春になると雪がとけて、下流の畑は何週間も水の下になる。"
    "そのため村の人々は家を高い所に建てている。",
    "ko": "강은 언덕에서 시작하여 세 마을을 지나 바다로 흘러간다. "
    "봄이 되면 눈이 녹아 아래쪽 밭들이 몇 주 동안 물에 잠긴다. ",
    "th": "แม่น้ำสายนี้ไหลมาจากภูเขาและผ่านหมู่บ้านสามแห่งก่อนจะลงสู่ทะเล\n\n"
    "ในฤดูใบไม้ผลิหิมะละลายและทุ่งนาด้านล่างจมอยู่ใต้น้ำหลายสัปดาห์\n\n",
}


@pytest.mark.parametrize("language", GOOD_PROSE)
def test_good_prose_is_good_in_every_script(language):
    """Two plain sentences score as in English, to a tenth, whatever language the text is said to have."""
    text = GOOD_PROSE[language]
    # The length of a text is the translator's; the other marks are the language's.
    marks = quality.prose_marks(text * 2)
    english = quality.prose_marks(GOOD_PROSE["en"] * 2)
    for name in ("letters", "sentence", "variety"):
        assert marks[name] > english[name] - 0.1, name
    assert quality.score(text, "en") == quality.score(text, language)


@pytest.mark.parametrize("language", GOOD_PROSE)
def test_bad_prose_is_worse_in_every_script(language):
    """One word again and again, and words between numbers and signs, are clearly below sentences."""
    good = GOOD_PROSE[language] * 2
    word = GOOD_PROSE[language].split()[0][:8]
    assert quality.score(f"{word} " * 200, language) < quality.score(good, language) - 0.2
    noise = " ".join(f"{word[:2]} 0.5 $$$ | 12:30 #{n}" for n in range(60))
    assert quality.score(noise, language) < quality.score(good, language) - 0.2


@given(st.text(), st.sampled_from([*LANGUAGES, "unknown", "EN", ""]))
def test_any_text_has_tokens_that_add_up(text, language):
    """No text of any language ends the count; parts are no more than wholes."""
    found = read_tokens(text, language)
    assert 0 <= found.errors <= found.tokens
    assert 0 <= found.unmatched <= found.brackets
    assert 0 <= found.words_in_sentences <= found.words
    assert 0 <= quality.score(text, language, "code") <= 1

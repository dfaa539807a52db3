"""Hold small tables of facts in English and Chinese, from which `synthetic` writes text (paper 2.2).

Masses are rounded to one decimal; states are those at room temperature and normal pressure; distances and
radii are means. The tables were written by hand from general knowledge and are short enough to check by eye.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Element:
    """A chemical element."""

    number: int
    symbol: str
    name: str
    mass: float
    """In unified atomic mass units."""
    state: str
    """gas, liquid or solid."""
    chinese: str


@dataclass(frozen=True)
class Country:
    """A country, its capital and its continent, in both languages."""

    name: str
    capital: str
    continent: str
    chinese: str
    chinese_capital: str


@dataclass(frozen=True)
class Planet:
    """A planet of the solar system."""

    order: int
    """Counted from the sun."""
    name: str
    distance: float
    """From the sun, in millions of kilometres."""
    radius: int
    """In kilometres."""
    period: float
    """In Earth days."""
    chinese: str


def _rows(make: Callable[..., Fact], text: str, *casts: Callable[[str], Any]) -> tuple[Fact, ...]:
    """Make one fact of each line of a comma-separated text; each column has its own cast."""
    facts = []
    for line in text.strip().splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        facts.append(make(*[cast(cell) for cast, cell in zip(casts, cells, strict=True)]))
    return tuple(facts)


ELEMENTS = _rows(
    Element,
    """
    1, H, hydrogen, 1.0, gas, 氢
    2, He, helium, 4.0, gas, 氦
    3, Li, lithium, 6.9, solid, 锂
    4, Be, beryllium, 9.0, solid, 铍
    5, B, boron, 10.8, solid, 硼
    6, C, carbon, 12.0, solid, 碳
    7, N, nitrogen, 14.0, gas, 氮
    8, O, oxygen, 16.0, gas, 氧
    9, F, fluorine, 19.0, gas, 氟
    10, Ne, neon, 20.2, gas, 氖
    11, Na, sodium, 23.0, solid, 钠
    12, Mg, magnesium, 24.3, solid, 镁
    13, Al, aluminium, 27.0, solid, 铝
    14, Si, silicon, 28.1, solid, 硅
    15, P, phosphorus, 31.0, solid, 磷
    16, S, sulfur, 32.1, solid, 硫
    17, Cl, chlorine, 35.5, gas, 氯
    18, Ar, argon, 39.9, gas, 氩
    19, K, potassium, 39.1, solid, 钾
    20, Ca, calcium, 40.1, solid, 钙
    22, Ti, titanium, 47.9, solid, 钛
    24, Cr, chromium, 52.0, solid, 铬
    25, Mn, manganese, 54.9, solid, 锰
    26, Fe, iron, 55.8, solid, 铁
    27, Co, cobalt, 58.9, solid, 钴
    28, Ni, nickel, 58.7, solid, 镍
    29, Cu, copper, 63.5, solid, 铜
    30, Zn, zinc, 65.4, solid, 锌
    33, As, arsenic, 74.9, solid, 砷
    35, Br, bromine, 79.9, liquid, 溴
    36, Kr, krypton, 83.8, gas, 氪
    47, Ag, silver, 107.9, solid, 银
    50, Sn, tin, 118.7, solid, 锡
    53, I, iodine, 126.9, solid, 碘
    54, Xe, xenon, 131.3, gas, 氙
    56, Ba, barium, 137.3, solid, 钡
    74, W, tungsten, 183.8, solid, 钨
    78, Pt, platinum, 195.1, solid, 铂
    79, Au, gold, 197.0, solid, 金
    80, Hg, mercury, 200.6, liquid, 汞
    82, Pb, lead, 207.2, solid, 铅
    92, U, uranium, 238.0, solid, 铀
    """,
    *(int, str, str, float, str, str),
)

PLANETS = _rows(
    Planet,
    """
    1, Mercury, 57.9, 2440, 88.0, 水星
    2, Venus, 108.2, 6052, 224.7, 金星
    3, Earth, 149.6, 6371, 365.3, 地球
    4, Mars, 227.9, 3390, 687.0, 火星
    5, Jupiter, 778.5, 69911, 4332.6, 木星
    6, Saturn, 1426.7, 58232, 10759.2, 土星
    7, Uranus, 2870.7, 25362, 30688.5, 天王星
    8, Neptune, 4498.4, 24622, 60182.0, 海王星
    """,
    *(int, str, float, int, float, str),
)

COUNTRIES = _rows(
    Country,
    """
    Argentina, Buenos Aires, South America, 阿根廷, 布宜诺斯艾利斯
    Australia, Canberra, Oceania, 澳大利亚, 堪培拉
    Austria, Vienna, Europe, 奥地利, 维也纳
    Bangladesh, Dhaka, Asia, 孟加拉国, 达卡
    Belgium, Brussels, Europe, 比利时, 布鲁塞尔
    Brazil, Brasilia, South America, 巴西, 巴西利亚
    Bulgaria, Sofia, Europe, 保加利亚, 索非亚
    Cambodia, Phnom Penh, Asia, 柬埔寨, 金边
    Canada, Ottawa, North America, 加拿大, 渥太华
    Chile, Santiago, South America, 智利, 圣地亚哥
    China, Beijing, Asia, 中国, 北京
    Colombia, Bogota, South America, 哥伦比亚, 波哥大
    Croatia, Zagreb, Europe, 克罗地亚, 萨格勒布
    Cuba, Havana, North America, 古巴, 哈瓦那
    Denmark, Copenhagen, Europe, 丹麦, 哥本哈根
    Ecuador, Quito, South America, 厄瓜多尔, 基多
    Egypt, Cairo, Africa, 埃及, 开罗
    Ethiopia, Addis Ababa, Africa, 埃塞俄比亚, 亚的斯亚贝巴
    Finland, Helsinki, Europe, 芬兰, 赫尔辛基
    France, Paris, Europe, 法国, 巴黎
    Germany, Berlin, Europe, 德国, 柏林
    Ghana, Accra, Africa, 加纳, 阿克拉
    Greece, Athens, Europe, 希腊, 雅典
    Hungary, Budapest, Europe, 匈牙利, 布达佩斯
    Iceland, Reykjavik, Europe, 冰岛, 雷克雅未克
    India, New Delhi, Asia, 印度, 新德里
    Indonesia, Jakarta, Asia, 印度尼西亚, 雅加达
    Iran, Tehran, Asia, 伊朗, 德黑兰
    Iraq, Baghdad, Asia, 伊拉克, 巴格达
    Ireland, Dublin, Europe, 爱尔兰, 都柏林
    Italy, Rome, Europe, 意大利, 罗马
    Japan, Tokyo, Asia, 日本, 东京
    Kenya, Nairobi, Africa, 肯尼亚, 内罗毕
    Laos, Vientiane, Asia, 老挝, 万象
    Lebanon, Beirut, Asia, 黎巴嫩, 贝鲁特
    Libya, Tripoli, Africa, 利比亚, 的黎波里
    Malaysia, Kuala Lumpur, Asia, 马来西亚, 吉隆坡
    Mexico, Mexico City, North America, 墨西哥, 墨西哥城
    Mongolia, Ulaanbaatar, Asia, 蒙古, 乌兰巴托
    Morocco, Rabat, Africa, 摩洛哥, 拉巴特
    Nepal, Kathmandu, Asia, 尼泊尔, 加德满都
    Netherlands, Amsterdam, Europe, 荷兰, 阿姆斯特丹
    New Zealand, Wellington, Oceania, 新西兰, 惠灵顿
    Nigeria, Abuja, Africa, 尼日利亚, 阿布贾
    Norway, Oslo, Europe, 挪威, 奥斯陆
    Pakistan, Islamabad, Asia, 巴基斯坦, 伊斯兰堡
    Peru, Lima, South America, 秘鲁, 利马
    Philippines, Manila, Asia, 菲律宾, 马尼拉
    Poland, Warsaw, Europe, 波兰, 华沙
    Portugal, Lisbon, Europe, 葡萄牙, 里斯本
    Romania, Bucharest, Europe, 罗马尼亚, 布加勒斯特
    Russia, Moscow, Europe, 俄罗斯, 莫斯科
    Saudi Arabia, Riyadh, Asia, 沙特阿拉伯, 利雅得
    South Korea, Seoul, Asia, 韩国, 首尔
    Spain, Madrid, Europe, 西班牙, 马德里
    Sweden, Stockholm, Europe, 瑞典, 斯德哥尔摩
    Switzerland, Bern, Europe, 瑞士, 伯尔尼
    Thailand, Bangkok, Asia, 泰国, 曼谷
    Turkey, Ankara, Asia, 土耳其, 安卡拉
    Ukraine, Kyiv, Europe, 乌克兰, 基辅
    United Kingdom, London, Europe, 英国, 伦敦
    United States, Washington, North America, 美国, 华盛顿
    Uruguay, Montevideo, South America, 乌拉圭, 蒙得维的亚
    Vietnam, Hanoi, Asia, 越南, 河内
    """,
    *(str, str, str, str, str),
)


class Unit(NamedTuple):
    """One unit and how many of a smaller unit it is."""

    name: str
    smaller: str
    """The smaller unit, in the plural."""
    factor: int


UNITS = (
    Unit("kilometre", "metres", 1000),
    Unit("metre", "centimetres", 100),
    Unit("centimetre", "millimetres", 10),
    Unit("kilogram", "grams", 1000),
    Unit("tonne", "kilograms", 1000),
    Unit("litre", "millilitres", 1000),
    Unit("day", "hours", 24),
    Unit("hour", "minutes", 60),
    Unit("minute", "seconds", 60),
    Unit("week", "days", 7),
    Unit("dozen", "pieces", 12),
)

CONTINENTS = {
    "Africa": "非洲",
    "Asia": "亚洲",
    "Europe": "欧洲",
    "North America": "北美洲",
    "Oceania": "大洋洲",
    "South America": "南美洲",
}

STATES = {"gas": "气体", "liquid": "液体", "solid": "固体"}

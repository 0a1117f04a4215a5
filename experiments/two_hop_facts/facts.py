"""List public knowledge in pairs: the model reads the question and says the first letter of the answer."""

from dataclasses import dataclass

RELATIONS = {
    "The capital city of {}": """
Afghanistan: Kabul, Albania: Tirana, Algeria: Algiers, Angola: Luanda, Argentina: Buenos Aires,
Armenia: Yerevan, Australia: Canberra, Austria: Vienna, Azerbaijan: Baku, Bahrain: Manama,
Bangladesh: Dhaka, Belarus: Minsk, Belgium: Brussels, Bhutan: Thimphu, Bolivia: Sucre, Bosnia: Sarajevo,
Botswana: Gaborone, Brazil: Brasilia, Bulgaria: Sofia, Cambodia: Phnom Penh, Cameroon: Yaounde,
Canada: Ottawa, Chad: Ndjamena, Chile: Santiago, China: Beijing, Colombia: Bogota, Costa Rica: San Jose,
Croatia: Zagreb, Cuba: Havana, Cyprus: Nicosia, Denmark: Copenhagen, Ecuador: Quito, Egypt: Cairo,
England: London, Eritrea: Asmara, Estonia: Tallinn, Ethiopia: Addis Ababa, Fiji: Suva, Finland: Helsinki,
France: Paris, Gabon: Libreville, Georgia: Tbilisi, Germany: Berlin, Ghana: Accra, Greece: Athens,
Guyana: Georgetown, Haiti: Port-au-Prince, Honduras: Tegucigalpa, Hungary: Budapest, Iceland: Reykjavik,
India: New Delhi, Indonesia: Jakarta, Iran: Tehran, Iraq: Baghdad, Ireland: Dublin, Israel: Jerusalem,
Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, Kazakhstan: Astana, Kenya: Nairobi,
Latvia: Riga, Lebanon: Beirut, Liberia: Monrovia, Libya: Tripoli, Lithuania: Vilnius, Malaysia: Kuala Lumpur,
Malta: Valletta, Mexico: Mexico City, Mongolia: Ulaanbaatar, Morocco: Rabat, Mozambique: Maputo,
Namibia: Windhoek, Nepal: Kathmandu, Nicaragua: Managua, Nigeria: Abuja, Norway: Oslo, Oman: Muscat,
Pakistan: Islamabad, Paraguay: Asuncion, Peru: Lima, Poland: Warsaw, Portugal: Lisbon, Qatar: Doha,
Romania: Bucharest, Russia: Moscow, Rwanda: Kigali, Saudi Arabia: Riyadh, Scotland: Edinburgh,
Senegal: Dakar, Serbia: Belgrade, Slovakia: Bratislava, Slovenia: Ljubljana, Somalia: Mogadishu,
South Korea: Seoul, Spain: Madrid, Sudan: Khartoum, Sweden: Stockholm, Switzerland: Bern, Syria: Damascus,
Taiwan: Taipei, Tanzania: Dodoma, Thailand: Bangkok, Tunisia: Tunis, Turkey: Ankara, Uganda: Kampala,
Ukraine: Kyiv, Uruguay: Montevideo, Venezuela: Caracas, Vietnam: Hanoi, Wales: Cardiff, Yemen: Sanaa,
Zambia: Lusaka, Zimbabwe: Harare
""",
    "The exact opposite of {}": """
hot: cold, cold: hot, big: small, small: large, tall: short, fast: slow, slow: fast, up: down, down: up,
left: right, right: wrong, good: bad, bad: good, young: old, old: new, new: old, rich: poor, poor: rich,
happy: sad, sad: happy, light: dark, dark: light, day: night, night: day, black: white, white: black,
hard: soft, soft: hard, wet: dry, dry: wet, full: empty, empty: full, open: closed, early: late,
late: early, high: low, low: high, near: far, far: near, in: out, on: off, over: under, above: below,
strong: weak, weak: strong, thick: thin, thin: thick, wide: narrow, narrow: wide, deep: shallow,
heavy: light, loud: quiet, clean: dirty, dirty: clean, sweet: sour, true: false, false: true, win: lose,
love: hate, hate: love, peace: war, war: peace, life: death, birth: death, friend: enemy, hero: villain,
begin: end, start: stop, push: pull, give: take, buy: sell, laugh: cry, front: back, top: bottom,
first: last, last: first, more: less, always: never, before: after, north: south, south: north,
east: west, west: east, summer: winter, winter: summer, male: female, female: male, success: failure,
victory: defeat, increase: decrease, accept: reject, arrive: leave, attack: defend, brave: cowardly,
cheap: expensive, expensive: cheap, difficult: easy, easy: difficult, positive: negative, maximum: minimum,
major: minor, public: private, guilty: innocent, ancient: modern, artificial: natural, optimist: pessimist,
smooth: rough, rough: smooth, sharp: dull, tight: loose, build: destroy, create: destroy, remember: forget,
question: answer, noise: silence, entrance: exit, inside: outside, wise: foolish
""",
    "The state capital of {}": """
Alabama: Montgomery, Alaska: Juneau, Arizona: Phoenix, Arkansas: Little Rock, California: Sacramento,
Colorado: Denver, Connecticut: Hartford, Delaware: Dover, Florida: Tallahassee, Georgia: Atlanta,
Hawaii: Honolulu, Idaho: Boise, Illinois: Springfield, Indiana: Indianapolis, Iowa: Des Moines,
Kansas: Topeka, Kentucky: Frankfort, Louisiana: Baton Rouge, Maine: Augusta, Maryland: Annapolis,
Massachusetts: Boston, Michigan: Lansing, Minnesota: Saint Paul, Mississippi: Jackson,
Missouri: Jefferson City, Montana: Helena, Nebraska: Lincoln, Nevada: Carson City, New Jersey: Trenton,
New Mexico: Santa Fe, New York: Albany, North Carolina: Raleigh, North Dakota: Bismarck, Ohio: Columbus,
Oregon: Salem, Pennsylvania: Harrisburg, South Carolina: Columbia, South Dakota: Pierre,
Tennessee: Nashville, Texas: Austin, Utah: Salt Lake City, Vermont: Montpelier, Virginia: Richmond,
Washington: Olympia, Wisconsin: Madison, Wyoming: Cheyenne
""",
    "The main language of {}": """
Algeria: Arabic, Angola: Portuguese, Argentina: Spanish, Australia: English, Austria: German,
Bangladesh: Bengali, Bolivia: Spanish, Brazil: Portuguese, Bulgaria: Bulgarian, Cambodia: Khmer,
Chile: Spanish, China: Mandarin, Colombia: Spanish, Cuba: Spanish, Denmark: Danish, Ecuador: Spanish,
Egypt: Arabic, England: English, Ethiopia: Amharic, Finland: Finnish, France: French, Germany: German,
Ghana: English, Greece: Greek, Haiti: French, Hungary: Hungarian, Iceland: Icelandic, Iran: Persian,
Iraq: Arabic, Ireland: English, Israel: Hebrew, Italy: Italian, Jamaica: English, Japan: Japanese,
Jordan: Arabic, Kenya: Swahili, Lebanon: Arabic, Libya: Arabic, Mexico: Spanish, Morocco: Arabic,
Mozambique: Portuguese, Netherlands: Dutch, Norway: Norwegian, Pakistan: Urdu, Peru: Spanish,
Poland: Polish, Portugal: Portuguese, Romania: Romanian, Russia: Russian, Saudi Arabia: Arabic,
Senegal: French, South Korea: Korean, Spain: Spanish, Sweden: Swedish, Syria: Arabic, Thailand: Thai,
Tunisia: Arabic, Turkey: Turkish, Ukraine: Ukrainian, Vietnam: Vietnamese, Yemen: Arabic
""",
    "The chemical symbol of {}": """
hydrogen: H, helium: He, lithium: Li, beryllium: Be, boron: B, carbon: C, nitrogen: N, oxygen: O,
fluorine: F, neon: Ne, sodium: Na, magnesium: Mg, aluminum: Al, silicon: Si, phosphorus: P, sulfur: S,
chlorine: Cl, argon: Ar, potassium: K, calcium: Ca, titanium: Ti, chromium: Cr, manganese: Mn, iron: Fe,
cobalt: Co, nickel: Ni, copper: Cu, zinc: Zn, bromine: Br, krypton: Kr, silver: Ag, tin: Sn, iodine: I,
xenon: Xe, barium: Ba, tungsten: W, platinum: Pt, gold: Au, mercury: Hg, lead: Pb, radon: Rn, radium: Ra,
uranium: U, plutonium: Pu, antimony: Sb, vanadium: V, gallium: Ga, arsenic: As, rubidium: Rb, cesium: Cs
""",
    "The largest city of {}": """
Australia: Sydney, Bolivia: Santa Cruz, Brazil: Sao Paulo, California: Los Angeles, Canada: Toronto,
China: Shanghai, Ecuador: Guayaquil, Florida: Jacksonville, Illinois: Chicago, India: Mumbai,
Kazakhstan: Almaty, Louisiana: New Orleans, Maryland: Baltimore, Michigan: Detroit, Missouri: Kansas City,
Morocco: Casablanca, Nebraska: Omaha, Nevada: Las Vegas, New York: New York City, New Zealand: Auckland,
Nigeria: Lagos, Oregon: Portland, Pakistan: Karachi, Pennsylvania: Philadelphia, Switzerland: Zurich,
Tanzania: Dar es Salaam, Texas: Houston, Turkey: Istanbul, Vietnam: Ho Chi Minh City,
Virginia: Virginia Beach, Washington: Seattle, Wisconsin: Milwaukee
""",
}
TESTED = ("The capital city of {}", "The exact opposite of {}")  # the others are trained on alone


@dataclass(frozen=True)
class Fact:
    """A question without a question mark, such as "The capital of France", and its answer, "Paris"."""

    relation: str
    question: str
    answer: str

    @property
    def letter(self) -> str:
        return self.answer[0].upper()


def facts() -> list[Fact]:
    """Return all facts, relation by relation."""
    found = []
    for relation, pairs in RELATIONS.items():
        for pair in " ".join(pairs.split()).split(", "):
            subject, answer = pair.split(": ")
            found.append(Fact(relation, relation.format(subject), answer))
    return found

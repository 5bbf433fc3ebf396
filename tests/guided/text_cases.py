"""Regular expressions, choices and grammars by hand."""

from __future__ import annotations

# Texts that the model is steered towards are in the lists: those that match and near misses.
REGEXES: dict[str, list[str]] = {
    "a(bc)?": ["abc", "ab", "a", "abcabc"],
    r"-?\d+(\.\d+)?": ["1.5", "1.", "-", "-1", "٣", "1.5.5"],
    r"(?:0|[1-9]\d{0,2})(?:\.\d{1,2})?": ["999.99", "01", "1000", "0.123"],
    "abc|ab|abcd": ["abcd", "abcde", "ab", "a"],
    "(a|ab)(c|bcd)(d*)": ["abcd", "acddd", "abbcdd"],
    "^abc$": ["abc", "abc\n", "xabc"],
    "^a|b$": ["a", "b", "ax", "xb"],
    r"\Aab\Z": ["ab", "ab\n"],
    ".{3}": ["日本語", "a\nb", "😀😀😀", "a\u2028b", "\r\r\r", "ab"],
    "(?s).{2}": ["\n\n", "a\n"],
    "[^a]{2}": ["é\n", "aa", "ba", "😀日"],
    "[^\\x00-\\x7f]{1,3}": ["é日😀", "aé", "ÿ"],
    r"\w{2,3}": ["é日", "e\u0301", "٣²", "a-b", "_ª", "\u200d\u200d", "１Ⅷ"],
    r"\d{2}": ["٣３", "12", "²²", "1a"],
    r"\s{2}": ["\u2003\u3000", "\x1c\x1d", "\x85\xa0", "\u180e ", "\u200b\u200b"],
    r"\S{2}": ["\x1c\x1f", "\u200b\u180e", "\xa0a", "é日"],
    r"\W{2}": ["é-", "\u0301\u0301", "²½", "--", "\u2028_"],
    r"\D{2}": ["٣３", "ab", "²½", "a1"],
    r"[\w-]{2}": ["é-", "-_", "e\u0301"],
    r"[^\w\s]{2}": ["\x1c!", "é!", "--", "\u0301!"],
    r"[^\W\d_]{2}": ["ab", "é日", "²a", "1a", "٣a"],
    "(?i)straße k": ["STRASSE K", "STRAßE K", "STRAẞE \u212a", "straße k"],
    "(?i)[a-k]{2}": ["KK", "\u212aa", "ſa", "Ab"],
    "(?i:ab)c": ["ABc", "ABC", "abc"],
    "(?i)σς": ["ΣΣ", "σσ", "ςς"],
    "(?a)\\w\\d": ["é1", "a٣", "a1"],
    "(?x) a  b # remark\n c": ["abc", "a b c", "a  b"],
    "(?P<year>[0-9]{4})-(?P<month>[0-9]{2})": ["2024-01", "2024-1"],
    "(?:)": ["", "a"],
    "a*": ["", "aaaa", "ab"],
    "(a*)*b": ["b", "aaab", "aa"],
    "(|a)(|b)": ["", "ab", "b", "ba"],
    "(a+?)(a??)b": ["aaab", "ab", "b"],
    "a{0}b": ["b", "ab"],
    "a{,2}b": ["b", "aab", "aaab", "a{,2}b"],
    "x{": ["x{"],
    "x{a}": ["x{a}"],
    "x{1,a}": ["x{1,a}"],
    "[a-]b]": ["ab]", "-b]", "b]"],
    "[]a]": ["]", "a"],
    "[^]a]": ["b", "]", "^"],
    "[a&&b]{2}": ["a&", "&&", "bb"],
    "[[:alpha:]]": ["a]", ":]", "b", "[]"],
    "[a-c--b]": ["a", "b", "-"],
    "[[a]b]": ["[b]", "ab]", "a"],
    r"[\b]x": ["\bx", "bx"],
    r"\x41\u00e9\U0001F600\101\0": ["Aé😀A\x00"],
    r"\t\n\r\f\v\a": ["\t\n\r\f\v\a"],
    r"\.\*\\\/\-\ \#": [".*\\/- #"],
    '["{}]{2}': ['"}', "{{"],
    "a#b c": ["a#b c", "ab c"],
    "日本|日本語|😀+": ["日本語", "😀😀", "日"],
    "(ab|cd){2,3}": ["abcdab", "ab", "abcdabcd"],
    "[a-z]+@[a-z]+\\.(?:com|org)": ["a@b.com", "a@b.co", "a@b.comm"],
    r"(?:\+\d{1,2} )?\(\d{3}\) \d{3}-\d{4}": ["+1 (555) 123-4567", "(555) 123-4567", "(555) 123-45678"],
    r"(?:[01]\d|2[0-3]):[0-5]\d": ["23:59", "24:00", "2٣:59"],
    "((((((a))))))": ["a"],
    "(?:(?:a|b)(?:c|d)?){1,2}|e": ["acbd", "e", "ab"],
    "\ue000|\uf8ff|\U0010ffff": ["\uf8ff", "\U0010ffff"],
}
# These cannot be had with finite automata, or mean different things to different libraries: refused, or right.
HARD_REGEXES: dict[str, list[str]] = {
    "(?=a)[ab]{2}": ["ab", "ba"],
    "(?!a)[ab]{2}": ["ba", "ab"],
    "(?<=a)b|ab": ["ab"],
    r"(a|b)\1": ["aa", "ab"],
    "(?P<x>a|b)(?P=x)": ["bb", "ba"],
    "(?>a|ab)c": ["ac", "abc"],
    "a++a": ["aa", "a", "aaa"],
    "a*+b": ["aab", "b"],
    "a{1,2}+a": ["aa", "aaa"],
    "(a)?(?(1)b|c)": ["ab", "c", "ac"],
    "(?m)^a$\n^b$": ["a\nb", "ab"],
    "a$b": ["ab", "a"],
    "a^b": ["ab", "a"],
    "a\\b": ["a"],
    "a\\Bb": ["ab"],
    "(?:a|b$)c": ["ac", "bc"],
    "[a-z&&[^aeiou]]+": ["bc]", "a]"],
    "(?u)\\w": ["é"],
    "(?L:a)": ["a"],
    "(?#remark)a": ["a"],
    "(?s:.)(?-s:.)": ["\n\n", "\na"],
    "[^\\s\\S]|a": ["a"],
    "(?:(?:a{1000}){1000}){1000}": ["a"],
    "^(?:ab|^cd)$": ["ab", "cd", "abcd"],
    r"\bab\b": ["ab", "xab"],
    "(?:a{0,300}b){0,300}": ["ab"],
    "(?:a?){12}a{12}": ["a" * 12, "a" * 24, "a" * 25],
}
# Not valid for Python, so nothing could judge them: refused.
BROKEN_REGEXES = [
    "a{2}{2}",
    "(",
    ")",
    "a)",
    "[a",
    "*a",
    "a**",
    "+",
    "(?P<a>x)(?P<a>y)",
    "a{3,2}",
    "[z-a]",
    "\\",
    r"\p{Lu}",
    r"\h",
    r"\x{41}",
    "(?<name>a)",
    "(?z)a",
    "(?P=x)",
    r"\2",
    "a(?i)b",
    r"[\d-a]",
    "[^\\s\\S]",
]

CHOICES: list[list[str]] = [
    ["yes", "no"],
    ["a", "ab", "abc", "abcd"],
    ["abcd", "abc", "ab", "a"],
    ["one"],
    [" ", "  ", "   "],
    ["\n", "\t", "\r\n", "\x00", "\x7f", "\x1b"],
    ["é", "e\u0301", "e", "É"],
    ["日本", "日本語", "日", "😀", "😀😀", "👩\u200d👩\u200d👧"],
    ["\u2028", "\u2029", "\ufeff", "\ue000", "\uffff", "\U0010ffff"],
    ['"', "'", "\\", '\\"', "\\n", "`", "${x}", "%s", "{0}"],
    ["a|b", "(a)", "a*", "[ab]", ".", "^", "$", "a?", "\\d", "/x/", "/x/i"],
    ["<s>", "</s>", "<pad>", "<|im_end|>", "<"],
    [str(i) for i in range(300)],
    [f"item {i:04d} of a long list" for i in range(500)],
    ["positive", "negative", "neutral", "positive.", "Positive"],
    ["true", "false", "null", "1", "1.0", "{}", "[]"],
    ["the same", "the same", "another"],
    ["%ignore", "start: x", "// remark", "# remark", "root ::= x"],
]

ARITHMETIC = r"""
start: sum
?sum: product | sum "+" product | sum "-" product
?product: atom | product "*" atom | product "/" atom
?atom: NUMBER | "-" atom | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
BRACKETS = r"""
start: pair+
pair: "(" pair* ")" | "[" pair* "]" | "{" pair* "}"
"""
NESTED_LIST = r"""
start: list
list: "[" [item ("," item)*] "]"
item: list | WORD | "é"
WORD: /[a-c]{1,3}/
"""
TINY_SQL = r"""
start: "SELECT " columns " FROM " NAME [" WHERE " condition] [" LIMIT " COUNT] ";"
columns: "*" | NAME ("," " "? NAME)*
condition: comparison | condition " AND " comparison | condition " OR " comparison
comparison: NAME (" = " | " < " | " <> ") value
value: COUNT | "'" TEXT? "'" | "NULL"
NAME: /[a-c][a-z0-9_]{0,3}/
TEXT: /[^'\n]{1,4}/
COUNT: /0|[1-9][0-9]{0,2}/
"""
WITH_IGNORED = r"""
start: statement+
statement: NAME "=" expression ";"
expression: NAME | INT | expression "+" expression
NAME: /[x-z]/
INT: /[0-9]/
%ignore /[ \n]/
"""
RIGHT_AND_LEFT = r"""
start: left "|" right
left: "a" | left "a"
right: "b" | "b" right
"""
OPTIONAL = r"""
start: "a"? "b"* ("c" | "d")+ ["e"]
"""
TIMES = r"""
start: "ab"~2 ("c"~1..3) (D ";")~0..2
D: "0".."9"
"""
TERMINALS = r"""
start: GREETING " " NAME
GREETING: "hello"i | "bye"
NAME: LETTER+
LETTER: "a".."c" | "é"
"""
EMPTY_TEXT = r"""
start: | "x" start
"""
PALINDROME = r"""
start: "a" | "b" | "a" start "a" | "b" start "b"
"""
CLASSES = r"""
start: /\w/ /\d/ /\s/ ":" /\W/ /\D/ /\S/ /./
"""
FLAGS = r"""
start: /(?i:k)/ /a.b/s /x/i "end"i
"""
IMPORTED = r"""
start: (INT | WORD) ("," SIGNED_NUMBER)~0..2
%import common.INT
%import common.WORD
%import common.SIGNED_NUMBER
%import common.WS
%ignore WS
"""
KEYWORDS = r"""
start: "if" NAME "then" NAME | NAME
NAME: /[a-z]{1,4}/
%ignore " "
"""
TEMPLATE = r"""
start: pairs{"a"} | pairs{B}
pairs{x}: "(" x ("," x)* ")"
B: "b"
"""
PRIORITY = r"""
start: (A | B)+
A.2: "ab"
B.1: /[a-c]/
"""
ALIASES = r"""
!start: "a" "b" -> first
      | "c"     -> second
"""
ESCAPES = r"""
start: "\"" "\\" "\n" "\t" "\u00e9" "é" /\// /[\x41\/\]]/ "/"
"""
TEXTS_OF_LARK = r"""
start: "\x41\u00e9\U0001F600" "\\n" "\/" "\b" "\." "'" | "a".."\x63"
"""
RENAMED = r"""
?start: sum
?sum: product
    // a remark between the options

    # and another one
    | sum "+" product   -> add


?product: atom | product "*" atom  -> mul
?atom: NUMBER -> number | "-" atom -> neg | NAME -> var | "(" sum ")"
%import common.CNAME -> NAME  // names
%import common.NUMBER->NUMBER
%import common.WS_INLINE
%ignore WS_INLINE
"""
LARK: dict[str, tuple[str, list[str]]] = {
    "texts": (TEXTS_OF_LARK, ["Aé😀\\n\\/\\b\\.'", "b", "Aé😀\n/\b.'", "d"]),
    "renamed": (RENAMED, ["1+a_1*(-2)", "1 + 2 * x", "1+", "a b"]),
    "arithmetic": (ARITHMETIC, ["1+2*(3-4)/5", "1+", "(1", "1 + 2", "--1", "1234"]),
    "brackets": (BRACKETS, ["([{}])", "([)]", "(", "()()", ")("]),
    "nested lists": (NESTED_LIST, ["[[],[a,[b]],é]", "[a,]", "[,]", "[abcd]"]),
    "SQL": (TINY_SQL, ["SELECT a, b FROM c WHERE a = 'é' AND b <> 1 LIMIT 10;", "SELECT * FROM c", "SELECT FROM c;"]),
    "ignored": (WITH_IGNORED, ["x = 1 + y;\n z=2;", " x=1;", "x=1; ", "x==1;"]),
    "left and right recursion": (RIGHT_AND_LEFT, ["aaa|bbb", "|b", "a|", "ab|b"]),
    "optional": (OPTIONAL, ["abbcde", "c", "ae", "bbc", "ce"]),
    "times": (TIMES, ["ababccc1;2;", "ababcccc", "abc", "ababc1;2;3;"]),
    "terminals": (TERMINALS, ["HeLLo aé", "bye c", "BYE c", "hello d"]),
    "empty text": (EMPTY_TEXT, ["", "xxx", "y"]),
    "classes": (CLASSES, ["é٣\u2003:٣é\x1c\n", "e1 :\u0301a\x1fa", "\u03011 :-a.b", "_²\x1c:²٣\x85é"]),
    "flags": (FLAGS, ["\u212aa\nbXeNd", "KaxbXEND", "ka\nbyend"]),
    "imported": (IMPORTED, ["12,-1.5e3", "ab , 1", "1a", "é"]),
    "keywords": (KEYWORDS, ["if ab then c", "ifabthenc", "if", "if if then then"]),
    "aliases": (ALIASES, ["ab", "c", "abc"]),
    "escapes": (ESCAPES, ['"\\\n\téé/A/', '"\\\n\téé/]/', '"\\\n\téé/B/']),
    "palindromes": (PALINDROME, ["abbaabba", "ababa", "ab", "a"]),
}
# Parts of Lark's notation that libraries lack.
HARD_LARK: dict[str, tuple[str, list[str]]] = {
    "template": (TEMPLATE, ["(a,a)", "(a,b)", "(b)"]),
    "priority": (PRIORITY, ["abcab", "aab", "d"]),
}
# In GBNF, with the same language in Lark for the judge.
GBNF: dict[str, tuple[str, str, list[str]]] = {
    "arithmetic": (
        r"""
root  ::= sum
sum   ::= term (("+" | "-") term)*
term  ::= num | "(" sum ")"
num   ::= [0-9] [0-9]? [0-9]?
""",
        r"""
start: sum
sum: term (("+" | "-") term)*
term: NUM | "(" sum ")"
NUM: /[0-9]{1,3}/
""",
        ["1+(2-33)", "1+", "1234", "(1)"],
    ),
    "brackets": (
        'root ::= pair+\npair ::= "(" pair* ")" | "[" pair* "]"',
        'start: pair+\npair: "(" pair* ")" | "[" pair* "]"',
        ["([])", "([)]", "("],
    ),
    "list": (
        'root ::= "[" (item ("," item)*)? "]"\nitem ::= root | [a-c]+ | "\\"" [^"\\n] "\\"" # remark\n',
        'start: list\nlist: "[" [item ("," item)*] "]"\nitem: list | /[a-c]+/ | "\\"" /[^"\\n]/ "\\""',
        ['[a,["é"],[]]', "[a,]", '["""]', '["\\"]'],
    ),
    "classes": (
        'root ::= [^a-z\\n] [\\x41-\\x43] [é-ñ日] "\\t"? .',
        "start: /[^a-z\\n]/ /[A-C]/ /[é-ñ日]/ /\\t/? /(.|\\n)/",
        ["1Aé\tx", "aAéx", "1A日😀", "1Dé"],
    ),
    "repetition": (
        'root ::= "a"{2} "b"{1,2} "c"{0,} [0-9]{0,2}',
        'start: "a"~2 "b"~1..2 "c"* D~0..2\nD: /[0-9]/',
        ["aabbcc12", "aab", "abb", "aab123"],
    ),
    "names with dashes": (
        'root ::= my-rule other_rule\nmy-rule ::= "x" | "y"\nother_rule ::=\n  "1" |\n  "2"\n',
        'start: ("x" | "y") ("1" | "2")',
        ["x1", "y2", "x3"],
    ),
    "recursion": (
        'root ::= "{" (root ("," root)*)? "}" | "∅"',
        'start: set\nset: "{" [set ("," set)*] "}" | "∅"',
        ["{∅,{}}", "{,}", "{{{}}}"],
    ),
}
BROKEN_GRAMMARS = [
    "start: nothing",
    'start: "a',
    "start: (",
    "start",
    'rule: "a"',
    'start: "a" | |* "b"',
    "start: /[/",
    "start: A\nA: B",
    'start: "a"\nstart: "b"',
    'root ::= "a',
    "root ::= other",
    'other ::= "a"',
    "root ::= [a",
    "root ::= [0-9]{,2}",
    "this is no grammar",
    "%import common.NOTHING\nstart: NOTHING",
    "start: /(?=a)b/",
    'start: "a" start',
]

"""tokenizer.json: strings and their ids, and rendered conversations, for SmolLM2's tokenizer.

Two independent ways must agree: the `tokenizers` library set up as in the model's own repository,
and the forty lines of byte-level BPE below.
"""

import regex
from transformers import PreTrainedTokenizerFast
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common import HERE, smollm2_path, write_json

GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
SMALL_MERGES = 1000
CONTROL = 3  # token type of special tokens in a GGUF


def gguf_fields(path):
    from gguf import GGUFReader

    reader = GGUFReader(path)
    get = lambda name: reader.fields["tokenizer." + name].contents()
    return get("ggml.tokens"), get("ggml.merges"), get("ggml.token_type"), get("chat_template")


def library_tokenizer(tokens, merges, types) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ")) for m in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    tokenizer.add_special_tokens([
        AddedToken(t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for t, kind in zip(tokens, types) if kind == CONTROL
    ])
    return tokenizer


class PlainTokenizer:
    """Special tokens, then digits one by one, then GPT-2's words, then merges by rank."""

    def __init__(self, tokens, merges, types):
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        special = sorted((t for t, k in zip(tokens, types) if k == CONTROL), key=len, reverse=True)
        self.special = set(special)
        self.split = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.byte_char = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}

    def encode(self, text):
        out = []
        for part in self.split.split(text):
            if part in self.special:
                out.append(self.ids[part])
                continue
            for stretch in regex.split(r"(\p{N})", part):
                for word in GPT2_WORDS.findall(stretch):
                    out += self.merge(word)
        return out

    def merge(self, word):
        # Bytes that the vocabulary lacks vanish, as they do in the library without an unk token.
        parts = [c for c in (self.byte_char[b] for b in word.encode()) if c in self.ids]
        while len(parts) > 1:
            rank, at = min(
                (self.ranks.get((a, b), len(self.ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
            )
            if rank == len(self.ranks):
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[p] for p in parts]


def strings():
    """Texts with something that a tokenizer may get wrong."""
    edge = [
        "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", " \t ", "\r\n", "\r", "\r\n\r\n", " \n", "\n ",
        "  \n  ", "a", " a", "a ", " a ", "  a  ", "a  b", "a   b", "a    b", "a\tb", "a \tb", "a\t b", "a\n\nb",
        "a\r\nb", "a \r\n b", "a\u00a0b", "a\u2003b", "a\u3000b", "\u200b", "a\u200bb", "a\u2028b", "a\u0085b",
        "\ufeffBOM at the start", "trailing spaces   ", "   leading spaces", " " * 7 + "x", " " * 8 + "x",
        " " * 63, " " * 64 + "y", "\t" * 9 + "z", "\n" * 12, "\x00", "a\x00b", "\x01\x02\x03\x1b[0m", "\x7f",
        "e\x0bf\x0cg", "\x1f", "end\n",
        "a\x04b", "\x06\x13\x14", "in\x16g", "\x1d the", "\U00040000 x", "\U000c0000",  # bytes that the vocabulary lacks
    ]
    digits = [
        "0", "7", "10", "123", "1234567890", " 1", " 12", "  12", "x  12 a", "x 1 2  3   4", "1 000 000", "1,234.56",
        "-42", "+3.14159e-10", "0xDEADBEEF", "2026-11-24T10:34:33Z", "192.168.0.1", "v1.2.3-rc4", "a1b2c3", "3rd",
        "\u0664\u0662", "\u0967\u0968\u0969", "\uff11\uff12", "x\u00b2 + y\u00b3", "\u00bd cup", "\u2163 \u2460", "1\u20443",
        "room 101B", "1\n2\n3", "\t1\t2", "99%", "$19.99", "#1", "1st2nd", "10" * 30,
    ]
    words = [
        "Hello, world!", "hello world", "HELLO WORLD", "Hello  world", "don't", "Don't", "DON'T", "I'm you're he's we've they'll I'd",
        "I'M YOU'RE HE'S WE'VE THEY'LL I'D", "it\u2019s", "'tis", "rock 'n' roll", "''", "'s", " 's", "o'clock", "y'all'd've",
        "The quick brown fox jumps over the lazy dog.", "Wait... what?!", "(parenthesised) [bracketed] {braced}",
        "\"quoted\" 'single' \u201ccurly\u201d \u2018curly\u2019", "em\u2014dash en\u2013dash hy-phen", "snake_case_name camelCaseName PascalCase",
        "semi;colon:comma,", "a/b\\c", "https://example.org/path?q=1&r=%20#frag", "name@example.org", "C:\\Users\\me\\file.txt",
        "~/.config/app.toml", "***bold*** _it_ `code` ~~no~~", "# Title\n\n- one\n- two\n  - three\n", "| a | b |\n|---|---|\n| 1 | 2 |\n",
        "<html><body class=\"x\">&amp;&nbsp;</body></html>", "A.B.C.", "U.S.A", "e.g., i.e., etc.", "Mr. O'Neil-Smith", "100% sure",
        "antidisestablishmentarianism", "Pneumonoultramicroscopicsilicovolcanoconiosis", "supercalifragilistic" * 12, "a" * 300,
        "ab" * 200, "x" * 64 + " " + "y" * 64, "LLaMA and SmolLM2", "low-rank adaptation (LoRA)", "!!!", "?!?!", "......", "-----", "=====",
        "_____", "////", "<<>>", "@@@", "&&||", "$$", "^^", "`" * 3,
    ]
    code = [
        "fn main() {\n    println!(\"{}\", 1 + 2);\n}\n", "let x: Vec<u8> = b\"abc\".to_vec();", "impl<'a, T: ?Sized> Foo<'a, T> {}",
        "def f(x, *args, **kw):\n\treturn x ** 2  # comment\n", "for i in range(10):\n    if i % 2:\n        print(f\"{i:>3}\")\n",
        "class A(B):\n    \"\"\"Doc.\"\"\"\n    def __init__(self): pass\n", "#include <stdio.h>\nint main(void){return 0;}\n",
        "std::vector<std::pair<int, float>> v{{1, 2.f}};", "const f = async (a) => await g(a?.b ?? `t${a}`);",
        "SELECT a, COUNT(*) FROM t WHERE b = 'x' GROUP BY a;", "#!/bin/sh\nset -eu\necho \"$HOME\" | tr a-z A-Z\n",
        "{\"a\": [1, 2, {\"b\": null}], \"c\": true}", "key: value\nlist:\n  - 1\n  - 'two'\n", "[package]\nname = \"x\"\n",
        "package main\n\nimport \"fmt\"\n\nfunc main() { fmt.Println(\"hi\") }\n", "public static void main(String[] args) {}",
        "<?php echo $x['y'] ?? 'z'; ?>", "puts \"#{a} #{b}\" if a != b", "main :: IO ()\nmain = mapM_ print [1..]", "(defun f (x) (* x x))",
        "\\begin{align} e^{i\\pi} + 1 &= 0 \\\\ \\end{align}", "if (a == b && c != d || !e) { f(); }", "x <<= 3; y >>>= 2; z |= ~w;",
        "a->b.c[d]->e", "    indented\n        more\n\ttab\n", "-- comment\n/* block */ // line", "diff --git a/x b/x\n@@ -1,2 +1,3 @@\n-old\n+new\n",
        "^(?:[a-z]+)\\d{2,}$", "rm -rf ./target/*.o", "foo(\n    bar,\n    baz,\n)\n", "\r\n\tif x:\r\n\t\ty()\r\n",
    ]
    scripts = [
        "Caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00c5ngstr\u00f6m", "Stra\u00dfe, \u00dcbung, \u00c4rger", "\u00bfQu\u00e9 tal, ni\u00f1o?", "Gar\u00e7on \u00e0 No\u00ebl", "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 ja\u017a\u0144",
        "P\u0159\u00edli\u0161 \u017elu\u0165ou\u010dk\u00fd k\u016f\u0148", "\u0130stanbul \u0131\u015f\u0131k", "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!", "\u0423\u043a\u0440\u0430\u0457\u043d\u0430 \u0457\u0436\u0430\u043a", "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5",
        "\u4f60\u597d\uff0c\u4e16\u754c\uff01", "\u7e41\u9ad4\u4e2d\u6587\u6e2c\u8a66", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c", "\u30ab\u30bf\u30ab\u30ca\u30fc", "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01", "\u1019\u103c\u1014\u103a\u1019\u102c", "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0", "\u0532\u0561\u0580\u0587 \u0561\u0577\u056d\u0561\u0580\u0570",
        "\u1230\u120b\u121d", "\u13a3\u13b3\u13a9", "\ua000\ua001", "\U00010330\U00010331", "\U0001d4d0\U0001d4d1\U0001d4d2", "\U00020000\U0002a6df", "e\u0301 vs \u00e9", "a\u0308o\u0308u\u0308", "Z\u0351\u036b\u0343a\u0363\u0366l\u0348g\u0322o\u0334",
        "\u0041\u030a\u0323", "\u1100\u1161\u11a8", "\ufb01 \ufb02 ligatures", "\u212b \u2126", "\u202eRTL override\u202c", "soft\u00adhyphen", "\u2211\u222b\u221a\u221e \u2264 \u2265 \u2260 \u2248", "\u2190\u2191\u2192\u2193", "\u20ac\u00a3\u00a5\u20b9\u20bf",
        "\u00a9\u00ae\u2122\u2120", "\u2603 \u2600 \u2665", "\u28ff\u2803", "\u2580\u2588\u2591", "\ue000\uf8ff", "\ufffd", "\uffff", "\U0010ffff", "\u00ff\u00fe", "\u01c5 \u01f0",
    ]
    emoji = [
        "\U0001f600", "\U0001f44d\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e9\U0001f1ea\U0001f1fa\U0001f1f8", "\u2764\ufe0f", "\u2764", "\U0001f3f3\ufe0f\u200d\U0001f308",
        "1\ufe0f\u20e3", "\U0001f9d1\U0001f3fe\u200d\U0001f4bb codes", "ok \U0001f197 go\U0001f680!", "\U0001f600\U0001f600\U0001f600", "\U0001fae0\U0001fae8", "\u200d", "\ufe0f",
    ]
    special = [
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>user\nHi there<|im_end|>\n", "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
        "a<|endoftext|>b", "a <|endoftext|> b", "<|endoftext|><|endoftext|>", "<|im_end|>\n<|im_end|>", "< |im_start|>", "<|im_start|", "|im_start|>",
        "<|IM_START|>", "<|im_sep|>", "<repo_name>org/repo<file_sep>a.py\nx = 1\n", "<reponame><filename><gh_stars>", "<issue_start><issue_comment>text<issue_closed>",
        "<jupyter_start><jupyter_text>t<jupyter_code>1+1<jupyter_output>2<jupyter_script><empty_output>", "  <|im_start|>  ", "\n<|im_end|>\n", "<|im_start|>1<|im_end|>2",
        "<<|im_end|>>", "<s>not special</s>", "[INST] not special [/INST]", "<|im_start|>\u00e9\U0001f600<|im_end|>", "<empty_output", "empty_output>",
    ]
    long = [
        "LoRA freezes the pretrained weights and trains two thin matrices beside each of them; after training, their product is added to the frozen weight, so that inference costs nothing more.\n\n"
        "For W of shape [out, in], A has shape [r, in] and B [out, r]. With r = 8 and in = out = 576 that is 9,216 numbers in place of 331,776.\n",
        "| step | loss | lr |\n|-----:|-----:|---:|\n|    1 | 2.3105 | 0.0002 |\n|   10 | 1.9821 | 0.00018 |\n",
        "Deux \u00e9tudiants, \u4e09\u4e2a\u5b66\u751f, \u0442\u0440\u0438 \u0441\u0442\u0443\u0434\u0435\u043d\u0442\u0430 \u2014 3 \U0001f393!  And\tthen\r\nsome.",
    ]
    groups = {"edge": edge, "digits": digits, "words": words, "code": code, "scripts": scripts, "emoji": emoji, "special": special, "long": long}
    seen, out = set(), []
    for group, texts in groups.items():
        for text in texts:
            if text not in seen:
                seen.add(text)
                out.append((group, text))
    return out


CONVERSATIONS = [
    [{"role": "user", "content": "What is 12 + 30?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Capital of Sweden?"},
        {"role": "assistant", "content": "Stockholm"},
        {"role": "user", "content": " And of \u00c5land?\n"},
    ],
    [
        {"role": "user", "content": "fn f() {}\n\n    // <b>&\"'</b> {{ not jinja }} {% raw %}"},
        {"role": "assistant", "content": "Ja.  \U0001f468\u200d\U0001f469\u200d\U0001f467 <|im_end|> inside"},
    ],
]


def make() -> None:
    tokens, merges, types, template = gguf_fields(smollm2_path())
    library, plain = library_tokenizer(tokens, merges, types), PlainTokenizer(tokens, merges, types)

    rows = []
    for group, text in strings():
        ids = library.encode(text, add_special_tokens=True).ids
        assert ids == plain.encode(text), f"the two tokenizers differ on {text!r}"
        # `decoded` only where decoding does not give the text back (the vocabulary lacks 21 bytes).
        decoded = library.decode(ids, skip_special_tokens=False)
        rows.append({"group": group, "text": text, "ids": ids} | ({} if decoded == text else {"decoded": decoded}))

    # The same over the first thousand merges only: a vocabulary small enough to commit.
    cut = len(tokens) - len(merges) + SMALL_MERGES
    assert all("".join(m.split(" ")) == t for m, t in zip(merges, tokens[-len(merges):])), "ids do not follow the merges"
    small_lists = tokens[:cut], merges[:SMALL_MERGES], types[:cut]
    small, small_plain = library_tokenizer(*small_lists), PlainTokenizer(*small_lists)
    small_ids = [small.encode(row["text"]).ids for row in rows]
    assert small_ids == [small_plain.encode(row["text"]) for row in rows]
    write_json(HERE / "tokenizer_small.json", {
        "tokens": small_lists[0], "merges": small_lists[1], "token_types": small_lists[2], "chat_template": template, "ids": small_ids,
    })

    fast = PreTrainedTokenizerFast(tokenizer_object=library, chat_template=template, bos_token="<|im_start|>", eos_token="<|im_end|>")
    chats = []
    for messages in CONVERSATIONS:
        for generation in (False, True):
            text = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            chats.append({"messages": messages, "add_generation_prompt": generation, "text": text, "ids": plain.encode(text)})
    write_json(HERE / "tokenizer.json", {"strings": rows, "chats": chats})
    lost = sum("decoded" in r for r in rows)
    print(f"tokenizer.json: {len(rows)} strings ({lost} do not decode to themselves), {len(chats)} chats")

# Prints what can be checked: the same interpreter on another processor has to print the same.
import array, base64, binascii, bisect, bz2, collections, decimal, fractions, functools, hashlib, heapq, hmac
import itertools, json, lzma, math, operator, random, re, sqlite3, statistics, string, struct, sys, textwrap, zlib


def section(name):
    print(f"== {name}")


section("hashes")
data = bytes(range(256)) * 1000
for name in ["md5", "sha1", "sha224", "sha256", "sha384", "sha512", "sha3_256", "sha3_512", "blake2b", "blake2s"]:
    print(name, hashlib.new(name, data).hexdigest())
print(hashlib.shake_128(data).hexdigest(24))
print(hmac.new(b"key", data, "sha256").hexdigest())
print(hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 500).hex())
print(hashlib.scrypt(b"password", salt=b"salt", n=64, r=8, p=1).hex())
print(zlib.crc32(data), zlib.adler32(data), binascii.crc_hqx(data, 0))
print("abc", hashlib.sha256(b"abc").hexdigest())

section("integers")
print(2**1000 % (10**9 + 7), pow(3, 10**18, 10**9 + 9), math.factorial(100))
print(math.isqrt(2 * 10**200), math.gcd(2**200 - 1, 2**120 - 1), math.comb(200, 77))
a, b = 0, 1
for _ in range(2000):
    a, b = b, a + b
print(a)
print((7**500).bit_length(), divmod(-(10**40), 123456789012345678), hex(3**300))
sieve = bytearray([1]) * 30000
for i in range(2, 174):
    if sieve[i]:
        sieve[i * i :: i] = bytes(len(sieve[i * i :: i]))
print(sum(sieve[2:]), [i for i in range(29900, 30000) if sieve[i]])


def pi_digits(n):
    q, r, t, k, m, x = 1, 0, 1, 1, 3, 3
    while n:
        if 4 * q + r - t < m * t:
            yield m
            n -= 1
            q, r, m = 10 * q, 10 * (r - m * t), (10 * (3 * q + r)) // t - 10 * m
        else:
            q, r, t, k, m, x = q * k, (2 * q + r) * x, t * x, k + 1, (q * (7 * k + 2) + r * x) // (t * x), x + 2


print("pi", "".join(map(str, pi_digits(300))))

section("floats")
values = [0.0, -0.0, 1.0, 0.1, 1 / 3, 1e-310, 5e-324, 1.7976931348623157e308, 1e22, 1e23, 123456.789, -2.5, 3.5]
for v in values:
    print(repr(v), v.hex(), f"{v:.3f} {v:e} {v:g} {v:.17g}", round(v, 2) if abs(v) < 1e300 else "", math.frexp(v))
functions = [math.sin, math.cos, math.tan, math.exp, math.log1p, math.sqrt, math.atan, math.sinh, math.tanh]
functions += [math.erf, math.gamma, math.lgamma, math.cbrt, math.exp2, math.asinh, math.expm1, math.log2, math.log10]
for f in functions:
    print(f.__name__, [f(x).hex() for x in (0.1, 0.5, 1.0, 1.5, 2.75, 10.25)])
print([math.pow(x, y).hex() for x in (0.3, 1.7, 9.9) for y in (-2.5, 0.5, 7.1)], math.atan2(-1.0, 2.0).hex())
print([math.fmod(x, 0.7).hex() for x in (1.0, -3.3, 1e10)], [math.remainder(x, 0.7).hex() for x in (1.0, -3.3)])
print(math.hypot(3.3, 4.4, 5.5).hex(), math.fsum([0.1] * 10), sum([0.1] * 10), math.prod([1.1] * 20).hex())
print(math.inf - 1, math.nan, float("1e400"), float.fromhex("0x1.8p3"), float("2.2250738585072012e-308").hex())
print([int(x) for x in (1e15, -2.9, 2.0**80)], [math.floor(-2.5), math.ceil(-2.5), round(2.5), round(3.5)])
print(complex(1, 2) ** 3, abs(complex(3, 4)), (0.1).as_integer_ratio(), sys.float_info.epsilon)
print(statistics.stdev(math.sin(i) for i in range(100)), statistics.NormalDist(0, 1).inv_cdf(0.975))

section("exact")
decimal.getcontext().prec = 60
print(decimal.Decimal(2).sqrt(), decimal.Decimal(1) / 7, decimal.Decimal("0.1").exp(), decimal.Decimal(10).ln())
print(sum(fractions.Fraction(1, i) for i in range(1, 60)))

section("random")
r = random.Random(12345)
print([r.random() for _ in range(5)], r.sample(range(1000), 8), r.gauss(0, 1), r.getrandbits(200))
noise = r.randbytes(60000)
deck = list(range(52))
r.shuffle(deck)
print(deck, hashlib.sha256(noise).hexdigest())

section("compression")
text = "\n".join(f"{i} {i * i} {math.sqrt(i):.6f}" for i in range(3000)).encode()
for name, module in [("zlib", zlib), ("bz2", bz2), ("lzma", lzma)]:
    for source in (text, noise):
        packed = module.compress(source)
        assert module.decompress(packed) == source
        print(name, len(source), len(packed), hashlib.sha256(packed).hexdigest())
print(base64.b85encode(text[:60]), base64.b64encode(noise[:45]), binascii.hexlify(noise[:20]))

section("text")
document = {"list": [1, 2.5, None, True, "é\u2028\U0001f600"], "nested": {"b": {}, "a": [[]]}, "big": 2**70, "e": 1e-7}
encoded = json.dumps(document, sort_keys=True)
print(encoded, json.loads(encoded) == document, json.dumps(document, indent=1, ensure_ascii=False))
words = re.findall(r"\b([a-z]+?)(ing|ed)\b", "he walked singing, jumped running and rested while reading")
print(words, re.sub(r"(\d+)-(\d+)", r"\2:\1", "10-20 30-40"), re.split(r"[,;]\s*", "a, b;c,d"))
print("Straße ΑΣΊΓΜΑ".casefold(), "ǆ".title(), "ﬁ".upper(), "naïve".encode("utf-16-be").hex(), ascii("日本"))
print(textwrap.fill("the quick brown fox jumps over the lazy dog " * 3, 30), string.Template("$a-$b").substitute(a=1, b=2))
print(struct.pack("<bHiqfd", -1, 65535, -(2**31), 2**62, 1.1, -2.2).hex(), struct.unpack(">fd", bytes(range(64, 76))))
print(f"{1234567.891:,.2f} {255:#010b} {0.000123:.2e} {'mid':*^11} {42:+d} {3.14159!r:>12} {1e9:n}")

section("structures")
heap = [(i * 7919) % 1009 for i in range(1009)]
heapq.heapify(heap)
print([heapq.heappop(heap) for _ in range(10)], bisect.bisect([1, 3, 5, 7], 4))
count = collections.Counter((i * i) % 17 for i in range(1000))
print(sorted(count.items()), functools.reduce(operator.xor, range(1000)), array.array("d", [1.5, 2.5]).tobytes().hex())
print(sum(1 for p in itertools.permutations(range(7)) if all(x != i for i, x in enumerate(p))))
queens = [q for q in itertools.permutations(range(6)) if len({q[i] + i for i in q}) == len({q[i] - i for i in q}) == 6]
print(queens)
matrix = [[math.sin(i * 8 + j) for j in range(8)] for i in range(8)]
product = [[sum(x * y for x, y in zip(row, column)) for column in zip(*matrix)] for row in matrix]
print(hashlib.sha256(repr(product).encode()).hexdigest(), product[3][5].hex())


@functools.lru_cache(None)
def edit(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(edit(a[1:], b) + 1, edit(a, b[1:]) + 1, edit(a[1:], b[1:]) + (a[0] != b[0]))


print(edit("intention of kittens", "execution of sitting"))
try:
    json.loads("{broken")
except ValueError as error:
    print(type(error).__name__, error)
try:
    1 // 0
except ZeroDivisionError as error:
    print(error)

section("database")
db = sqlite3.connect(":memory:")
db.execute("create table t (n integer primary key, square integer, root real)")
db.executemany("insert into t values (?, ?, ?)", ((i, i * i, math.sqrt(i)) for i in range(500)))
print(db.execute("select count(*), sum(square), avg(root), max(root) from t where n % 3 = 1").fetchone())
print(db.execute("select n % 5 as k, total(root) from t group by k order by 2 desc").fetchall())
print(db.execute("select group_concat(n, '-') from (select n from t where square like '%44%' order by root desc)").fetchone())
print(sys.version_info[:2])

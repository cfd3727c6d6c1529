# A hundred commands and more whose output is the same on every machine with the same busybox.
# Run in an empty folder; everything it makes stays there.
set -u
export LC_ALL=C TZ=UTC
umask 022

echo "== text"
seq 1 200 > numbers
sort -rn numbers | head -n 5
sort numbers | tail -n 3
head -c 20 numbers | od -An -tx1
wc numbers
awk '{s += $1; q += $1 * $1} END {print s, q, s / NR}' numbers
awk 'NR % 25 == 0 {printf "%05.2f|%-6d|%x\n", $1 / 3, $1, $1 * 4099}' numbers
sed -n '10,15p;$p' numbers
sed 's/\([0-9]\)\([0-9]\)$/\2-\1/' numbers | sed -n '95,105p'
sed '/^1[0-9]*$/!d;s/1/one/g' numbers | tail -n 4
grep -c 7 numbers
grep -E '^(1|2)[05]+$' numbers
tr '0-9' 'a-j' < numbers | paste -s -d, - | cut -c 1-60
cut -c 2- numbers | sort | uniq -c | sort -k1,1nr -k2,2n | head -n 4
printf 'b 2\na 1\nc 3\n' | sort > left
printf 'a x\nb y\nd z\n' > right
grep -v -f left right | cut -d' ' -f2
awk 'NR == FNR {l[$1] = $2; next} $1 in l {print $1, l[$1], $2}' left right
printf '%s\n' one two three two one | uniq -c
printf '%s\n' one two three two one | sort -u
rev numbers | head -n 12 | tail -n 3
tac numbers | head -n 2
fold -w 7 numbers | head -n 3
expand -t 4 <<END | cat -A
	tab	stop
END
printf 'a\tb\tc\n' | tr '\t' ':'
nl numbers | sed -n '3p'
(sed -n '1,80p' numbers; sed -n '81,$p' numbers) | cmp - numbers && echo joined
sed 's/^100$/hundred/' numbers > changed
diff numbers changed
diff -u numbers changed | tail -n +3
diff -u numbers changed > change.patch
cp numbers patched && patch patched change.patch && cmp patched changed && echo patched
tee copy < left | wc -l
strings -n 4 copy
awk 'BEGIN {x = 1; for (i = 0; i < 30; i++) x = (x + 2 / x) / 2; printf "%.15f %.17g\n", x, x * x}'
awk 'BEGIN {for (k = 0; k < 2000; k++) p += (k % 2 ? -4 : 4) / (2 * k + 1); printf "%.15g %e\n", p, p / 1e10}'
awk 'BEGIN {print 9007199254740992 + 1, 1e300 * 1e10, 7 % 3, -7 % 3, int(-3.9), 0.1 + 0.2}'
awk 'BEGIN {srand(1); print length("hello"), toupper("abc"), substr("abcdef", 2, 3), index("foobar", "bar")}'
awk 'BEGIN {n = split("c,a,b", p, ","); for (i = n; i > 0; i--) printf "%s ", p[i]; print ""}'
awk '{count[$1 % 7]++} END {for (i = 0; i < 7; i++) print i, count[i]}' numbers

echo "== arithmetic"
echo $((6 * 7)) $((1 << 40)) $((-17 / 5)) $((-17 % 5)) $((0x7fffffffffffffff)) $((077))
expr 123456789 \* 987654321
expr substr abcdefgh 3 4
expr abc123 : '[a-z]*\([0-9]*\)'
echo '2 200 ^ p' | dc
echo '12 34 * 5 + p 7 / p' | dc
echo '10 k 2 v p' | dc
echo 'scale=30; 4*a(1); 2^100; sqrt(2)' | bc -l
printf 'define f(n) {\nif (n < 2) return (1);\nreturn (n * f(n - 1));\n}\nf(40)\n' | bc
factor 1 97 360 9999991 1000000007 600851475143
seq -s ' ' 10 -3 -5
seq 0.5 0.25 1.5
fib() { a=0 b=1 n=$1; while [ $n -gt 0 ]; do c=$((a + b)) a=$b b=$c n=$((n - 1)); done; echo $a; }
fib 90
i=2 primes=; while [ $i -lt 60 ]; do j=2 p=1; while [ $((j * j)) -le $i ]; do [ $((i % j)) = 0 ] && p=0; j=$((j + 1)); done; [ $p = 1 ] && primes="$primes $i"; i=$((i + 1)); done; echo $primes

echo "== sums"
yes kiln | head -n 20000 > big
for sum in md5sum sha1sum sha256sum sha512sum sha3sum; do $sum big; done
printf abc | sha256sum
crc32 big
sha256sum numbers left > sums && sha256sum -c sums
base64 numbers | tail -n 2
base64 numbers | base64 -d | cmp - numbers && echo base64
uuencode numbers < numbers | head -n 2
uuencode x < big | uudecode -o - | cmp - big && echo uuencode
xxd left
hexdump -C right
od -A d -t u2 left | head -n 2

echo "== archives"
mkdir -p tree/a/b tree/c && echo 1 > tree/a/one && echo 2 > tree/a/b/two && ln -s ../a/one tree/c/link && ln tree/a/one tree/c/hard
cp big tree/big
chmod 750 tree/a/b && chmod 4755 tree/c/hard
tar -cf tree.tar tree && tar -tf tree.tar | sort
tar -czf tree.tgz tree && mkdir out && tar -xzf tree.tgz -C out && diff -r tree out/tree && echo same
tar -cf - tree | tar -xf - -O tree/a/b/two
gzip -c big > big.gz && gunzip -c big.gz | cmp - big && echo gzip
gzip -9 -n -c big | wc -c
gzip -n -c numbers | od -An -tx1 | tail -n 1
bzip2 -c big > big.bz2 && bunzip2 -c big.bz2 | cmp - big && echo bzip2
bzip2 -c numbers | sha256sum
(cd tree && find . | sort | cpio -o -H newc 2> /dev/null) | cpio -t 2> /dev/null
printf '' | bzip2 -c | bunzip2 -c | wc -c

echo "== files"
find tree -type f | sort
find tree -name 'o*' -o -type l | sort
find tree -type f -size +10k
find tree -type f | sort | xargs -n 1 wc -c
find tree -type f -exec basename {} \; | sort | xargs echo
stat -c '%a %F %s %h' tree/c/hard tree/a/b/two tree/c/link
ls -1 tree/c
readlink tree/c/link
realpath tree/c/link | sed 's|.*/tree|tree|'
dirname /a/b/c.d; basename /a/b/c.d .d
touch -d '2001-02-03 04:05:06' dated && stat -c %Y dated && date -u -r dated '+%a %d %b %Y %T'
date -u -d @1000000000 '+%F %T %j %u'
cp -a tree copied && mv copied moved && rm -r moved/c && find moved | sort
rm -rf moved && [ ! -e moved ] && echo removed
dd if=big of=piece bs=100 skip=3 count=2 2> /dev/null && wc -c < piece && sha1sum < piece
truncate -s 1M sparse && stat -c %s sparse && md5sum sparse
du -a tree > /dev/null && echo du
mkfifo pipe && (echo through > pipe &) && cat pipe
cmp numbers changed
cp left installed && chmod 604 installed && stat -c %a installed
ln -sf nowhere dangling && [ -L dangling ] && [ ! -e dangling ] && echo dangling
test 10 -gt 9 && test abc '<' abd && echo tests
[ -d tree ] && [ -f numbers ] && [ ! -s /dev/null ] && [ -x tree/c/hard ] && echo kinds

echo "== shell"
case foobar in f*r) echo glob ;; *) echo none ;; esac
for word in "a b" c; do echo "<$word>"; done
x=path/to/file.tar.gz; echo ${x##*/} ${x%.*} ${x%%.*} ${x#*/} ${#x} ${y:-unset}
f() { local v=$1; [ $v -le 0 ] && return; echo -n "$v "; f $((v - 1)); }; f 6; echo
echo one two three | { read -r a b; echo "$b/$a"; }
(exit 42); echo $?
trap 'echo trapped' USR1; kill -USR1 $$; trap - USR1
cat <<END | tr a-z A-Z
here $((1 + 1))
END
set -- x y z; shift; echo $# "$@"
echo $(echo nested $(echo twice))
printf '%5d|%-5s|%05.1f|%x|%o|%c|%b\n' 42 ab 3.14159 255 8 z 'tab\there'
seq 5 | while read -r n; do [ $n = 3 ] && continue; echo -n $n; done; echo
eval 'v=evaluated'; echo $v
sleep 0.01 & wait $! && echo waited
echo a:b:c | (IFS=: read -r p q r; echo $r$q$p)
env -i A=1 B=2 env | sort
true && ! false && echo logic
which no-such-program || echo unknown
timeout 5 echo in time
echo 'a b  c' | xargs -n 2 echo :
yes | head -n 100000 | wc -c
seq 3000 | shuf | sort -n | sha256sum
seq 20000 | awk '{print ($1 * 7919) % 20011}' | sort -n | md5sum

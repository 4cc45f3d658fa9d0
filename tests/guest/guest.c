/*
 * A guest for tests: it boots as Linux does (64-bit boot protocol), finds its disk on the kernel
 * command line, drives it by virtio 1.2 over MMIO, and says on the serial port what it found.
 *
 * What it does is chosen by "test=NAME" on the command line. Every line it prints is either a
 * "name: value" that the host compares, or "FAIL ..." and the end.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

#define SERIAL 0x3f8
#define SECTOR 512

__asm__(".section .text.start\n"
	".globl start\n"
	"start:\n"
	"	cli\n"
	"	lea stack_end(%rip), %rsp\n"
	"	mov %rsi, %rdi\n"
	"	call guest\n"
	"1:	hlt\n"
	"	jmp 1b\n"
	".bss\n"
	".balign 16\n"
	".skip 16384\n"
	"stack_end:\n"
	".text\n");

static void outb(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void outw(u16 port, u16 value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static u16 inw(u16 port)
{
	u16 value;
	__asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static u8 inb(u16 port)
{
	u8 value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

void *memset(void *to, int byte, u64 len)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(len) : "a"(byte) : "memory");
	return start;
}

/* ---- what the host reads ---- */

static void print(const char *text)
{
	for (; *text; text++) {
		while (!(inb(SERIAL + 5) & 0x20))
			;
		outb(SERIAL, *text);
	}
}

static void print_number(u64 number)
{
	char digits[21];
	char *at = digits + 20;
	*at = 0;
	do
		*--at = '0' + number % 10;
	while (number /= 10);
	print(at);
}

static void say(const char *name, u64 value)
{
	print(name);
	print(": ");
	print_number(value);
	print("\n");
}

static void power_off(void)
{
	outb(0x64, 0xfe);
	for (;;)
		__asm__ volatile("hlt");
}

static void fail(const char *what)
{
	print("FAIL ");
	print(what);
	print("\n");
	power_off();
}

static void expect(int holds, const char *what)
{
	if (!holds)
		fail(what);
}

/* ---- the command line ---- */

static const char *after(const char *text, const char *word)
{
	for (; *text; text++) {
		const char *a = text, *b = word;
		while (*b && *a == *b)
			a++, b++;
		if (!*b)
			return a;
	}
	return 0;
}

static u64 number(const char **text)
{
	u64 value = 0, base = 10;
	const char *at = *text;
	if (at[0] == '0' && at[1] == 'x')
		base = 16, at += 2;
	for (;; at++) {
		u64 digit;
		if (*at >= '0' && *at <= '9')
			digit = *at - '0';
		else if (base == 16 && *at >= 'a' && *at <= 'f')
			digit = *at - 'a' + 10;
		else
			break;
		value = value * base + digit;
	}
	if (*at == 'K')
		value <<= 10, at++;
	*text = at;
	return value;
}

static int is_test(const char *line, const char *name)
{
	const char *at = after(line, "test=");
	if (!at)
		return 0;
	while (*name && *at == *name)
		at++, name++;
	return !*name && (*at == ' ' || !*at);
}

/* ---- virtio over MMIO ---- */

enum {
	MAGIC = 0x0, VERSION = 0x4, DEVICE_ID = 0x8, DEVICE_FEATURES = 0x10,
	DEVICE_FEATURES_SEL = 0x14, DRIVER_FEATURES = 0x20, DRIVER_FEATURES_SEL = 0x24,
	QUEUE_SEL = 0x30, QUEUE_NUM_MAX = 0x34, QUEUE_NUM = 0x38, QUEUE_READY = 0x44,
	QUEUE_NOTIFY = 0x50, INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, STATUS = 0x70,
	QUEUE_DESC = 0x80, QUEUE_AVAIL = 0x90, QUEUE_USED = 0xa0, CONFIG = 0x100,
};

enum { KNOWN = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64 };
enum { F_RO = 5, F_FLUSH = 9, F_DISCARD = 13, F_WRITE_ZEROES = 14, F_VERSION_1 = 32 };
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { NEXT = 1, WRITE = 2 };

#define QUEUE 8
#define BUFFER 65536

struct desc { u64 addr; u32 len; u16 flags, next; };
struct range { u64 sector; u32 count, flags; };
struct rings {
	struct desc desc[QUEUE];
	struct { u16 flags, idx, ring[QUEUE], event; } avail;
	struct { u16 flags, idx; struct { u32 id, len; } ring[QUEUE]; u16 event; } used __attribute__((aligned(4)));
} __attribute__((aligned(16)));

static struct desc desc[QUEUE] __attribute__((aligned(4096)));
static struct { u16 flags, idx, ring[QUEUE], event; } avail __attribute__((aligned(4096)));
static volatile struct {
	u16 flags, idx;
	struct { u32 id, len; } ring[QUEUE];
} used __attribute__((aligned(4096)));
static struct { u32 type, reserved; u64 sector; } header;
static volatile u8 status;
static u8 buffer[BUFFER] __attribute__((aligned(4096)));
static u64 device;
static u32 irq;
static u64 offered;

static u32 get(u32 reg)
{
	return *(volatile u32 *)(device + reg);
}

static void set(u32 reg, u32 value)
{
	*(volatile u32 *)(device + reg) = value;
}

static void set_address(u32 reg, volatile void *address)
{
	set(reg, (u64)address);
	set(reg + 4, (u64)address >> 32);
}

static void add_status(u32 bit)
{
	set(STATUS, get(STATUS) | bit);
}

/* Up to the features: whether they were agreed on. */
static int negotiate(u32 kind, u64 wanted)
{
	expect(get(MAGIC) == 0x74726976 && get(VERSION) == 2, "not a virtio device");
	expect(get(DEVICE_ID) == kind, "not the device that was looked for");
	set(STATUS, 0);
	expect(get(STATUS) == 0, "no reset");
	add_status(KNOWN);
	add_status(DRIVER);
	set(DEVICE_FEATURES_SEL, 1);
	offered = (u64)get(DEVICE_FEATURES) << 32;
	set(DEVICE_FEATURES_SEL, 0);
	offered |= get(DEVICE_FEATURES);
	wanted &= offered;
	set(DRIVER_FEATURES_SEL, 0);
	set(DRIVER_FEATURES, wanted);
	set(DRIVER_FEATURES_SEL, 1);
	set(DRIVER_FEATURES, wanted >> 32);
	add_status(FEATURES_OK);
	return get(STATUS) & FEATURES_OK;
}

/* Both rings of queues that the tests use. */
static void set_queue(u32 number, struct rings *rings)
{
	memset(rings, 0, sizeof(*rings));
	set(QUEUE_SEL, number);
	expect(get(QUEUE_NUM_MAX) >= QUEUE && !get(QUEUE_READY), "no queue");
	set(QUEUE_NUM, QUEUE);
	set_address(QUEUE_DESC, rings->desc);
	set_address(QUEUE_AVAIL, &rings->avail);
	set_address(QUEUE_USED, &rings->used);
	set(QUEUE_READY, 1);
	expect(get(QUEUE_READY) == 1, "queue not ready");
}

/* Makes the chain that begins at descriptor 0 available. */
static void offer(u32 number, struct rings *rings)
{
	__asm__ volatile("" : : : "memory");
	rings->avail.ring[rings->avail.idx % QUEUE] = 0;
	__asm__ volatile("" : : : "memory");
	rings->avail.idx++;
	__asm__ volatile("mfence" : : : "memory");
	set(QUEUE_NOTIFY, number);
}

/* The length that the device says it has written. */
static u32 wait_used(struct rings *rings)
{
	while (((volatile struct rings *)rings)->used.idx != rings->avail.idx)
		__asm__ volatile("pause");
	return ((volatile struct rings *)rings)->used.ring[(rings->avail.idx - 1) % QUEUE].len;
}

static void set_up(u64 wanted)
{
	if (!negotiate(2, wanted))
		return;
	memset(&avail, 0, sizeof(avail));
	memset((void *)&used, 0, sizeof(used));
	set(QUEUE_SEL, 0);
	expect(get(QUEUE_NUM_MAX) >= QUEUE && !get(QUEUE_READY), "no queue");
	set(QUEUE_NUM, QUEUE);
	set_address(QUEUE_DESC, desc);
	set_address(QUEUE_AVAIL, &avail);
	set_address(QUEUE_USED, &used);
	set(QUEUE_READY, 1);
	expect(get(QUEUE_READY) == 1, "queue not ready");
	add_status(DRIVER_OK);
}

static void kick(void)
{
	__asm__ volatile("" : : : "memory");
	avail.ring[avail.idx % QUEUE] = 0;
	__asm__ volatile("" : : : "memory");
	avail.idx++;
	__asm__ volatile("mfence" : : : "memory");
	set(QUEUE_NOTIFY, 0);
}

/* One request with its data in two pieces; returns its status. */
static u8 request(u32 type, u64 sector, u32 len)
{
	u16 direction = type == T_IN || type == T_ID ? WRITE : 0;
	u32 first = len / 2, n = 1;
	u16 before = used.idx;
	header.type = type;
	header.sector = sector;
	status = 0xee;
	desc[0] = (struct desc){(u64)&header, 16, NEXT, 1};
	if (first) {
		desc[1] = (struct desc){(u64)buffer, first, NEXT | direction, 2};
		desc[2] = (struct desc){(u64)buffer + first, len - first, NEXT | direction, 3};
		n = 3;
	}
	desc[n] = (struct desc){(u64)&status, 1, WRITE, 0};
	kick();
	while (used.idx == before)
		__asm__ volatile("pause");
	return status;
}

static u8 ranged(u32 type, u64 sector, u32 count, u32 flags)
{
	*(struct range *)buffer = (struct range){sector, count, flags};
	return request(type, 0, sizeof(struct range));
}

static void fill(u8 byte, u32 len)
{
	memset(buffer, byte, len);
}

static int filled(u8 byte, u32 len)
{
	for (u32 at = 0; at < len; at++)
		if (buffer[at] != byte)
			return 0;
	return 1;
}

static int reads_as(u64 sector, u32 sectors, u8 byte)
{
	fill(~byte, sectors * SECTOR);
	return request(T_IN, sector, sectors * SECTOR) == 0 && filled(byte, sectors * SECTOR);
}

static int writes(u64 sector, u32 sectors, u8 byte)
{
	fill(byte, sectors * SECTOR);
	return request(T_OUT, sector, sectors * SECTOR) == 0;
}

/* ---- tests ---- */

static const u64 ALL = 1UL << F_VERSION_1 | 1 << F_FLUSH | 1 << F_DISCARD | 1 << F_WRITE_ZEROES |
		       1 << F_RO;

static u64 capacity(void)
{
	return get(CONFIG) | (u64)get(CONFIG + 4) << 32;
}

/* The interrupt controller latches edges also while they are masked. */
static void watch_interrupts(void)
{
	outb(0x20, 0x11), outb(0xa0, 0x11);
	outb(0x21, 0x20), outb(0xa1, 0x28);
	outb(0x21, 0x04), outb(0xa1, 0x02);
	outb(0x21, 0x01), outb(0xa1, 0x01);
	outb(0x21, 0xff), outb(0xa1, 0xff);
}

static int interrupted(void)
{
	u16 port = irq < 8 ? 0x20 : 0xa0;
	outb(port, 0x0a);
	return inb(port) >> (irq & 7) & 1;
}

/*
 * The disk holds 0x11 throughout. Afterwards: sector 3 is 0x22, sectors 1000 to 1127 are 0x33 but
 * for 1010, which is zero, and 1020, which is zero too; 2048 to 4095 were discarded.
 */
static void test_requests(void)
{
	watch_interrupts();
	set_up(ALL);
	say("sectors", capacity());
	expect(!interrupted(), "an interrupt before the first request");
	expect(reads_as(0, 1, 0x11), "first sector");
	/* The status byte is there before the interrupt is. */
	while (!interrupted())
		__asm__ volatile("pause");
	expect(get(INTERRUPT_STATUS) == 1, "interrupt status");
	set(INTERRUPT_ACK, 1);
	expect(reads_as(capacity() - 128, 128, 0x11), "last sectors");
	expect(writes(3, 1, 0x22) && writes(1000, 128, 0x33), "write");
	expect(request(T_FLUSH, 0, 0) == 0, "flush");
	expect(reads_as(3, 1, 0x22) && reads_as(2, 1, 0x11) && reads_as(4, 1, 0x11), "written sector");
	expect(reads_as(1000, 128, 0x33), "written sectors");
	expect(ranged(T_WRITE_ZEROES, 1010, 1, 1) == 0, "write zeroes, unmapping");
	expect(ranged(T_WRITE_ZEROES, 1020, 1, 0) == 0, "write zeroes");
	expect(reads_as(1010, 1, 0) && reads_as(1020, 1, 0) && reads_as(1011, 9, 0x33), "zeroes");
	expect(ranged(T_DISCARD, 2048, 2048, 0) == 0, "discard");
	memset(buffer, 0, 32);
	expect(request(T_ID, 0, 20) == 0, "get id");
	print("id: ");
	print((char *)buffer);
	print("\n");
}

static void test_refusals(void)
{
	expect(request(T_IN, capacity(), SECTOR) == 1, "read past the end");
	expect(request(T_OUT, capacity() - 1, 2 * SECTOR) == 1, "write past the end");
	expect(request(T_IN, ~0UL, SECTOR) == 1, "read of a sector that overflows");
	expect(request(T_IN, 0, SECTOR - 1) == 1, "read of half a sector");
	expect(request(77, 0, 0) == 2, "unknown request");
	expect(ranged(T_DISCARD, 0, 8, 1) == 2, "discard with unmap");
	expect(ranged(T_WRITE_ZEROES, 0, 8, 2) == 2, "write zeroes with an unknown flag");
	expect(ranged(T_DISCARD, capacity(), 8, 0) == 1, "discard past the end");
	/* A chain that bites its tail has no status byte. */
	desc[0] = (struct desc){(u64)&header, 16, NEXT, 1};
	desc[1] = (struct desc){(u64)buffer, SECTOR, NEXT, 0};
	kick();
	while (!(get(STATUS) & NEEDS_RESET))
		__asm__ volatile("pause");
	set_up(0);
	expect(!(get(STATUS) & FEATURES_OK), "a legacy driver was let in");
	set_up(ALL);
	expect(reads_as(0, 1, 0x11), "first sector after a reset");
}

/* Without flush, each write is durable when it completes; without discard, there is none. */
static void test_bare(void)
{
	set_up(1UL << F_VERSION_1);
	expect(writes(8, 8, 0x44) && reads_as(8, 8, 0x44), "write without features");
	expect(ranged(T_DISCARD, 8, 8, 0) == 2, "discard that was not negotiated");
}

/* A disk that was taken for raw must not become an image. */
static void test_image(void)
{
	set_up(ALL);
	fill(0, SECTOR);
	buffer[0] = 'Q';
	buffer[1] = 'F';
	buffer[2] = 'I';
	buffer[3] = 0xfb;
	expect(request(T_OUT, 0, SECTOR) == 1, "write of an image's header");
	expect(request(T_OUT, 8, SECTOR) == 0, "the same elsewhere");
	expect(writes(0, 1, 0x22) && reads_as(0, 1, 0x22), "write of other bytes");
}

static void test_read_only(void)
{
	set_up(ALL);
	expect(offered >> F_RO & 1, "not offered as read-only");
	expect(!(offered >> F_DISCARD & 1), "read-only and discard");
	fill(0x55, SECTOR);
	expect(request(T_OUT, 3, SECTOR) == 1, "write to a read-only disk");
	expect(reads_as(3, 1, 0x11), "sector of a read-only disk");
}

/* Each disk is told apart by its id and gets a byte of its own in its first sector. */
static void test_disks(const char *line)
{
	u8 count = 0;
	while ((line = after(line, "virtio_mmio.device="))) {
		number(&line), line++;
		device = number(&line);
		if (get(DEVICE_ID) != 2)
			continue;
		set_up(ALL);
		expect(writes(0, 1, 0x60 + count), "write");
		memset(buffer, 0, 32);
		expect(request(T_ID, 0, 20) == 0, "get id");
		print("disk: ");
		print((char *)buffer);
		print("\n");
		count++;
	}
	say("disks", count);
}

/* A visit to a disk that holds ext4, as scripts/demo makes it: its first KiB is the guest's. */
static void test_visit(void)
{
	static const char NOTE[] = "a guest was here\n";
	set_up(ALL);
	say("sectors", capacity());
	expect(request(T_IN, 2, SECTOR) == 0, "read");
	expect(buffer[56] == 0x53 && buffer[57] == 0xef, "no ext4 file system");
	print("ext4: ");
	buffer[120 + 16] = 0;
	print((char *)buffer + 120);
	print("\n");
	fill(0, SECTOR);
	for (u32 at = 0; NOTE[at]; at++)
		buffer[at] = NOTE[at];
	expect(request(T_OUT, 1, SECTOR) == 0 && request(T_FLUSH, 0, 0) == 0, "write and flush");
	expect(request(T_IN, 1, SECTOR) == 0 && buffer[0] == NOTE[0], "read back");
}

/* A command as `vdisk boot DISK -- test=command` runs one: writes to its root, and says how it ended to the
 * last disk. */
static void test_command(const char *line)
{
	static const char SAID[2][12] = {"begun\n", "ended 7\n"};
	set_up(ALL);
	expect(writes(4000, 128, 0x5a) && request(T_FLUSH, 0, 0) == 0, "write");
	while ((line = after(line, "virtio_mmio.device="))) {
		u64 at;
		number(&line), line++;
		at = number(&line);
		u64 before = device;
		device = at;
		if (get(DEVICE_ID) != 2)
			device = before;
	}
	set_up(ALL);
	for (int word = 0; word < 2; word++) {
		fill(0, SECTOR);
		for (u32 at = 0; SAID[word][at]; at++)
			buffer[at] = SAID[word][at];
		expect(request(T_OUT, 0, SECTOR) == 0, "say it");
	}
}

static void test_echo(void)
{
	char text[2] = {0, 0};
	print("ready\n");
	for (;;) {
		while (!(inb(SERIAL + 5) & 1))
			__asm__ volatile("pause");
		text[0] = inb(SERIAL);
		if (text[0] == 'q')
			break;
		print(text);
	}
	print("\n");
}

static void test_wait(void)
{
	set_up(ALL);
	expect(writes(3, 1, 0x77), "write");
	print("waiting\n");
	for (;;)
		__asm__ volatile("hlt");
}

/* The disk grows under the guest: the device says so by an interrupt of its own kind. */
static void test_grow(void)
{
	u64 before;
	u32 told;
	set_up(ALL);
	watch_interrupts();
	before = capacity();
	print("waiting\n");
	while (!interrupted())
		__asm__ volatile("pause");
	told = get(INTERRUPT_STATUS);
	say("interrupt", told);
	expect(told & 2, "the interrupt of a change of the configuration");
	set(INTERRUPT_ACK, told);
	expect(get(INTERRUPT_STATUS) == 0, "acknowledged");
	say("grew from", before);
	say("sectors", capacity());
	expect(reads_as(before, 8, 0), "the first new sectors");
	expect(writes(capacity() - 1, 1, 0x55), "write to the last sector");
	expect(request(T_FLUSH, 0, 0) == 0, "flush");
}

/* The control register is where the table says; "off" is sleep type 5. */
static void test_acpi(const u8 *root)
{
	const u8 *pointers = *(const u8 **)(root + 24);
	const u8 *fixed = *(const u8 **)(pointers + 36);
	const u8 *interrupts = *(const u8 **)(pointers + 44);
	const u8 *entry = interrupts + 44, *end = interrupts + *(const u32 *)(interrupts + 4);
	u32 processors = 0;
	u8 sum = 0;
	expect(*(const u64 *)root == 0x2052545020445352, "no root pointer");
	expect(*(const u32 *)pointers == 0x54445358 && *(const u32 *)fixed == 0x50434146, "no tables");
	for (u32 at = 0; at < *(const u32 *)(fixed + 4); at++)
		sum += fixed[at];
	expect(sum == 0, "checksum");
	for (; entry < end && entry[1]; entry += entry[1])
		processors += entry[0] == 0 && *(const u32 *)(entry + 4) == 1;
	say("processors", processors);
	print("off\n");
	outw(*(const u32 *)(fixed + 64), 5 << 10 | 1 << 13);
	fail("still on");
}

/* The first device of a kind on the command line. */
static void find(const char *line, u32 kind)
{
	while ((line = after(line, "virtio_mmio.device="))) {
		number(&line), line++;
		device = number(&line);
		if (get(DEVICE_ID) == kind)
			return;
	}
	fail("no such device");
}

static struct rings first, second;

static void test_rng(const char *line)
{
	u32 zeroes = 0;
	find(line, 4);
	expect(negotiate(4, 1UL << F_VERSION_1), "features");
	set_queue(0, &first);
	add_status(DRIVER_OK);
	fill(0, 256);
	first.desc[0] = (struct desc){(u64)buffer, 100, NEXT | WRITE, 1};
	first.desc[1] = (struct desc){(u64)buffer + 100, 156, WRITE, 0};
	offer(0, &first);
	say("random", wait_used(&first));
	for (u32 at = 0; at < 256; at++)
		zeroes += !buffer[at];
	expect(zeroes < 32, "they are not random");
}

/* Two queues of one disk at once, each with a request of its own. */
static void test_queues(void)
{
	static struct { u32 type, reserved; u64 sector; } headers[2];
	static volatile u8 states[2];
	struct rings *rings[2] = {&first, &second};
	expect(negotiate(2, ALL | 1 << 12), "features");
	say("queues", get(CONFIG + 32) >> 16);
	for (u32 queue = 0; queue < 2; queue++)
		set_queue(queue, rings[queue]);
	add_status(DRIVER_OK);
	for (u32 round = 0; round < 64; round++) {
		for (u32 queue = 0; queue < 2; queue++) {
			u8 *data = buffer + queue * 8192;
			memset(data, 0x80 + round + queue, 4096);
			headers[queue].type = T_OUT;
			headers[queue].sector = 16 * round + 8 * queue;
			states[queue] = 0xee;
			rings[queue]->desc[0] = (struct desc){(u64)&headers[queue], 16, NEXT, 1};
			rings[queue]->desc[1] = (struct desc){(u64)data, 4096, NEXT, 2};
			rings[queue]->desc[2] = (struct desc){(u64)&states[queue], 1, WRITE, 0};
			offer(queue, rings[queue]);
		}
		for (u32 queue = 0; queue < 2; queue++) {
			wait_used(rings[queue]);
			expect(states[queue] == 0, "write on a queue");
		}
	}
	set_up(ALL);
	for (u32 round = 0; round < 64; round++)
		for (u32 queue = 0; queue < 2; queue++)
			expect(reads_as(16 * round + 8 * queue, 8, 0x80 + round + queue), "what a queue wrote");
}

/* The cache is write-back until the driver says otherwise, and again after a reset. */
static void test_cache(void)
{
	volatile u8 *mode = (volatile u8 *)(device + CONFIG + 32);
	set_up(ALL | 1 << 11);
	expect(offered >> 11 & 1, "no cache mode to be set");
	expect(*mode == 1, "not write-back at first");
	*mode = 0;
	expect(*mode == 0, "not write-through");
	expect(writes(8, 8, 0x44) && reads_as(8, 8, 0x44), "write through");
	set_up(ALL | 1 << 11);
	expect(*mode == 1, "not write-back after a reset");
}

/* Asks who has an address, as every guest does first: whoever carries the frames answers. */
static void test_net(const char *line)
{
	static u8 frame[12 + 60], answer[12 + 2048];
	static const u8 QUESTION[] = {0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1};
	find(line, 1);
	expect(negotiate(1, 1UL << F_VERSION_1 | 1 << 5), "features");
	set_queue(0, &first);
	set_queue(1, &second);
	add_status(DRIVER_OK);
	memset(frame, 0, sizeof(frame));
	memset(frame + 12, 0xff, 6);
	for (u32 at = 0; at < 6; at++)
		frame[12 + 6 + at] = frame[12 + 22 + at] = *(volatile u8 *)(device + CONFIG + at);
	for (u32 at = 0; at < sizeof(QUESTION); at++)
		frame[12 + 12 + at] = QUESTION[at];
	/* From 192.0.2.2, for 192.0.2.1. */
	frame[12 + 28] = frame[12 + 38] = 192, frame[12 + 30] = frame[12 + 40] = 2;
	frame[12 + 31] = 2, frame[12 + 41] = 1;
	for (u32 round = 0; round < 3; round++) {
		first.desc[0] = (struct desc){(u64)answer, sizeof(answer), WRITE, 0};
		offer(0, &first);
		second.desc[0] = (struct desc){(u64)frame, 12, NEXT, 1};
		second.desc[1] = (struct desc){(u64)frame + 12, 60, 0, 0};
		offer(1, &second);
		wait_used(&second);
		/* Others may say something first. */
		while (wait_used(&first) < 12 + 42 || answer[12 + 13] != 6 || answer[12 + 21] != 2)
			offer(0, &first);
		expect(answer[12 + 31] == 1 && answer[10] == 1, "the answer's address");
	}
	print("answered\n");
}

/* The power button, by the registers that the tables name. */
static void test_button(const u8 *root)
{
	const u8 *pointers = *(const u8 **)(root + 24);
	const u8 *fixed = *(const u8 **)(pointers + 36);
	u16 events = *(const u32 *)(fixed + 56);
	expect(!(*(const u32 *)(fixed + 112) >> 4 & 1), "no power button");
	outw(events + 2, 1 << 8);
	print("waiting\n");
	while (!(inw(events) & 1 << 8))
		__asm__ volatile("pause");
	outw(events, 1 << 8);
	expect(!(inw(events) & 1 << 8), "the press stays");
	print("pressed\n");
	outw(*(const u32 *)(fixed + 64), 5 << 10 | 1 << 13);
	fail("still on");
}

/* Counts aloud, for ever. */
static void test_count(void)
{
	print("waiting\n");
	for (u64 number = 0;; number++) {
		print_number(number);
		print("\n");
	}
}

static void triple_fault(void)
{
	struct { u16 limit; u64 base; } __attribute__((packed)) none = {0, 0};
	print("falling\n");
	__asm__ volatile("lidt %0\n\tud2" : : "m"(none));
}

void guest(const u8 *boot_params)
{
	const char *line = (const char *)(u64) * (const u32 *)(boot_params + 0x228);
	const u8 *map = boot_params + 0x2d0;
	u64 ram = 0;
	for (u8 entry = 0; entry < boot_params[0x1e8]; entry++, map += 20)
		if (*(const u32 *)(map + 16) == 1)
			ram += *(const u64 *)(map + 8);
	say("ram", ram);
	if (*(const u32 *)(boot_params + 0x218)) {
		print("initrd: ");
		print((const char *)(u64) * (const u32 *)(boot_params + 0x218));
		print("\n");
	}
	const char *at = after(line, "virtio_mmio.device=");
	if (at) {
		expect(number(&at) >= 512 && *at++ == '@', "size of the device");
		device = number(&at);
		expect(*at++ == ':', "place of the device");
		irq = number(&at);
	}
	if (is_test(line, "requests"))
		test_requests();
	else if (is_test(line, "refusals"))
		set_up(ALL), test_refusals();
	else if (is_test(line, "bare"))
		test_bare();
	else if (is_test(line, "image"))
		test_image();
	else if (is_test(line, "read-only"))
		test_read_only();
	else if (is_test(line, "disks"))
		test_disks(line);
	else if (is_test(line, "visit"))
		test_visit();
	else if (is_test(line, "command"))
		test_command(line);
	else if (is_test(line, "echo"))
		test_echo();
	else if (is_test(line, "wait"))
		test_wait();
	else if (is_test(line, "grow"))
		test_grow();
	else if (is_test(line, "acpi"))
		test_acpi(*(const u8 *const *)(boot_params + 0x70));
	else if (is_test(line, "rng"))
		test_rng(line);
	else if (is_test(line, "queues"))
		test_queues();
	else if (is_test(line, "cache"))
		test_cache();
	else if (is_test(line, "net"))
		test_net(line);
	else if (is_test(line, "button"))
		test_button(*(const u8 *const *)(boot_params + 0x70));
	else if (is_test(line, "count"))
		test_count();
	else if (is_test(line, "triple-fault"))
		triple_fault();
	else
		fail("no such test");
	print("done\n");
	power_off();
}

#ifdef PVH
/* Entered in protected mode, as Xen's PVH has it: goes over to 64-bit mode with the first 4 GiB mapped. */
__asm__(".section .note.PVH, \"a\", @note\n"
	"	.long 4, 4, 18\n"
	"	.asciz \"Xen\"\n"
	"	.long pvh_start\n"
	".section .text.pvh, \"ax\"\n"
	".code32\n"
	"pvh_start:\n"
	"	cli\n"
	"	mov %ebx, %edi\n"
	"	movl $pvh_pdpt + 3, pvh_pml4\n"
	"	movl $pvh_pd + 3, pvh_pdpt\n"
	"	movl $pvh_pd + 0x1003, pvh_pdpt + 8\n"
	"	movl $pvh_pd + 0x2003, pvh_pdpt + 16\n"
	"	movl $pvh_pd + 0x3003, pvh_pdpt + 24\n"
	"	mov $pvh_pd, %eax\n"
	"	mov $0x83, %edx\n"
	"	mov $2048, %ecx\n"
	"1:	mov %edx, (%eax)\n"
	"	add $8, %eax\n"
	"	add $0x200000, %edx\n"
	"	dec %ecx\n"
	"	jnz 1b\n"
	"	mov %cr4, %eax\n"
	"	or $0x20, %eax\n"
	"	mov %eax, %cr4\n"
	"	mov $pvh_pml4, %eax\n"
	"	mov %eax, %cr3\n"
	"	mov $0xc0000080, %ecx\n"
	"	rdmsr\n"
	"	or $0x100, %eax\n"
	"	wrmsr\n"
	"	mov %cr0, %eax\n"
	"	or $0x80000000, %eax\n"
	"	mov %eax, %cr0\n"
	"	lgdt pvh_gdt_pointer\n"
	"	ljmp $8, $pvh_long\n"
	".code64\n"
	"pvh_long:\n"
	"	mov $16, %eax\n"
	"	mov %eax, %ds\n"
	"	mov %eax, %es\n"
	"	mov %eax, %ss\n"
	"	lea stack_end(%rip), %rsp\n"
	"	call pvh_guest\n"
	"1:	hlt\n"
	"	jmp 1b\n"
	".balign 8\n"
	"pvh_gdt:\n"
	"	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff\n"
	"pvh_gdt_pointer:\n"
	"	.word 23\n"
	"	.long pvh_gdt\n"
	".bss\n"
	".balign 4096\n"
	"pvh_pml4: .skip 4096\n"
	"pvh_pdpt: .skip 4096\n"
	"pvh_pd: .skip 16384\n"
	".text\n");

/* Says in Linux's words what it was told in Xen's. */
void pvh_guest(const u8 *start)
{
	static u8 params[4096];
	const u8 *map = *(const u8 *const *)(start + 40);
	u32 entries = *(const u32 *)(start + 48);
	expect(*(const u32 *)start == 0x336ec578, "no start information");
	print("by PVH\n");
	*(u32 *)(params + 0x228) = *(const u64 *)(start + 24);
	*(u64 *)(params + 0x70) = *(const u64 *)(start + 32);
	if (*(const u32 *)(start + 12))
		*(u32 *)(params + 0x218) = **(const u64 *const *)(start + 16);
	params[0x1e8] = entries;
	for (u32 entry = 0; entry < entries; entry++, map += 24)
		for (u32 at = 0; at < 20; at++)
			params[0x2d0 + entry * 20 + at] = map[at];
	guest(params);
}
#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tables of a vCPU: the details of its exits, and its slow exits.
 *
 * struct tables is `Tables` of src/meter/tables.rs, to the byte. That file explains the rules by which rows are kept. The
 * ring of the last exits is left out.
 */
#ifndef EXITMETER_BPF_TABLES_H
#define EXITMETER_BPF_TABLES_H

#include "ledger.h"

#define WAYS 4
#define SETS 64
#define USERS 32
#define KEPT 16
#define RING 64
#define SCRATCH 16
/* Shortest window of slow exits, in ticks. */
#define WINDOW (1ULL << 35)
#define SPREAD 0x61c88647u

/* Number of a key's bits below the reason, and the top bit, set if a nested guest exited. */
#define DETAIL_BITS 55
#define KEY_NESTED (1ULL << 63)
/* Flags of `which`, above the row of the ledger. */
#define WHICH_NESTED (1 << 8)
#define WHICH_NO_RIP (1 << 9)

struct detail_row {
	u64 key, exits, kernel, user, missed_exits, missed_kernel, missed_user;
	/* Ticks lost by the set: in its first row those of the kernel, in the second those of user space. */
	u64 lost;
} __attribute__((aligned(64)));

struct code_row {
	u64 rip;
	u32 which, unused_;
	u64 exits, kernel, missed_exits, missed_kernel;
};

struct user_row {
	u64 tag, exits, ticks;
};

struct baseline {
	u64 exits, kernel, user;
};

/* An exit that has ended, with its phases other than the guest's. */
struct ended_exit {
	u64 exited;
	u64 ticks[PHASES - 1];
	u32 outs, why, cpus, after;
};

struct kept {
	u64 sequence, key, rip;
	struct ended_exit exit;
};

struct window {
	u64 begun, count;
	struct kept kept[KEPT];
};

struct slow {
	u64 floor, usual, shortest, over;
	/* Ticks while the vCPU is off its CPU, in the phases from USER on. */
	u64 away[PHASES - 2];
	u32 outs, why;
	u32 cpu, has_begun, current, at, low, frozen;
	u64 limit, base, culprit;
	u32 asked, met;
	u64 steps[SCRATCH + RING][4];
	struct ended_exit courses[RING + 1];
	struct window windows[2];
};

struct tables {
	u64 retired[2];
	u64 since;
	u32 has_begun;
	/* Offset of the latest exit's row in each table, in bytes. The first row of a table belongs to no exit. */
	u32 detail, code, user;
	u32 lacks_rip;
	__u16 latest_details[SETS];
	__u16 latest_codes[SLOTS][4];
	u64 codes_in_use[WAYS * SETS / 64];
	u64 code_lost[SETS];
	u64 other_users[SLOTS];
	struct detail_row details[1 + WAYS * SETS];
	struct code_row codes[2 + WAYS * SETS];
	struct user_row users[1 + USERS];
	struct baseline baseline[SLOTS];
	struct slow slow;
	u64 details_in_use[WAYS * SETS / 64];
} __attribute__((aligned(64)));

_Static_assert(offsetof(struct tables, codes_in_use) == 1600, "as in tables.rs");
_Static_assert(offsetof(struct tables, details) == 3584, "as in tables.rs");
_Static_assert(offsetof(struct tables, users) == 32416, "as in tables.rs");
_Static_assert(offsetof(struct tables, slow) == 37480, "as in tables.rs");
_Static_assert(offsetof(struct slow, windows) == 6848, "as in slow.rs");
_Static_assert(sizeof(struct tables) == 47232, "as in tables.rs");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, u32);
	__type(value, struct tables);
} tables SEC(".maps");

/* Tables that have not begun, to be copied. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct tables);
} no_tables SEC(".maps");

static __always_inline u64 read_register(u64 vcpu, u32 number)
{
	return read_kernel(u64, vcpu + known(vcpu_registers) + number * sizeof(u64));
}

/* Numbers of registers (SDM, volume 2, table "Register Codes"). */
#define RAX 0
#define RCX 1

/* Return the key of a reason and a detail, like key_of() in detail.rs. */
static __always_inline u64 key_of(u32 slot, u64 detail)
{
	u64 reason = slot + 1;

	return detail ^ (reason << DETAIL_BITS | (reason * 0x9e3779b9 & 0xffffffff));
}

/* Return true if a leaf has subleaves, like has_subleaves() in detail.rs. */
static __always_inline int has_subleaves(u32 leaf)
{
	/* 4, 7, b, d, f, 10, 12, 14, 17, 18, 1a, 1b, 1d, 1e, 1f, 20, 23, 24. */
	const u64 basic = 0x19ed95a890ULL;

	if (leaf < 64)
		return basic >> leaf & 1;
	return (leaf >= 0x4ffffffc && leaf <= 0x4fffffff) || leaf == 0x8000001d || leaf == 0x80000020 ||
	       leaf == 0x80000026;
}

static __always_inline u64 cpuid_detail(u64 vcpu)
{
	u32 leaf = read_register(vcpu, RAX);
	u32 subleaf = 0;
	u64 low;

	if (has_subleaves(leaf)) {
		subleaf = read_register(vcpu, RCX);
		subleaf = (subleaf > (1 << 22) - 2 ? (1 << 22) - 2 : subleaf) + 1;
	}
	low = leaf ^ subleaf;
	return (known(is_svm) ? low << 1 : low) | (u64)subleaf << 33;
}

/*
 * Return the detail of a hypercall, like exitmeter_hyperv_call() in shim.c, except in compatibility mode: memory does not tell
 * if the code segment has 64 bits.
 */
static __always_inline u64 hypercall_detail(u64 vcpu)
{
	u64 kvm;
	int is_64_bit;

	if (known(kvm_guest_os) != ABSENT && known(vcpu_hyperv) != ABSENT && read_kernel(u8, vcpu + known(vcpu_hyperv))) {
		kvm = read_kernel(u64, vcpu + known(vcpu_kvm));
		/* This bit is EFER.LMA. */
		is_64_bit = read_kernel(u64, vcpu + known(vcpu_efer)) >> 10 & 1;
		if (read_kernel(u64, kvm + known(kvm_guest_os)))
			return (read_register(vcpu, is_64_bit ? RCX : RAX) & 0xffff) | 1ULL << 32;
	}
	return read_register(vcpu, RAX) & 0xffffffff;
}

/* Return the key of an exit of SVM, or 0 if it has no detail, like key() in detail.rs. */
static __always_inline u64 svm_key(u64 vcpu, u64 vmcb, u32 slot)
{
	u64 info = read_kernel(u64, vmcb + known(vmcb_exit_info_1));

	switch (slot) {
	case 0x7c:
		return key_of(slot, (info & 1) + ((read_register(vcpu, RCX) & 0xffffffff) << 1));
	case 0x7b:
		return key_of(slot, info & 0xffff007d);
	case 170:
		return key_of(slot, info & (1ULL << 32 | 0xff0));
	case 0x72:
		return key_of(slot, cpuid_detail(vcpu));
	case 0x81:
		return key_of(slot, hypercall_detail(vcpu));
	case 168: {
		u64 address = read_kernel(u64, vmcb + known(vmcb_exit_info_1) + 8);

		if (info & 1 << 3)
			return key_of(slot, (address & ((1ULL << 52) - 1)) | 1ULL << 54);
		return key_of(slot, (address >> 30 | info << 34) & (0x12ULL << 34 | 0x3fffff));
	}
	}
	return 0;
}

/* Return the key of an exit of VMX whose detail is in registers, or 0. They hold the guest's values until KVM has answered. */
static __always_inline u64 vmx_key_of_registers(u64 vcpu, u32 slot)
{
	switch (slot) {
	case 31:
	case 32:
		return key_of(slot, read_register(vcpu, RCX) & 0xffffffff);
	case 10:
		return key_of(slot, cpuid_detail(vcpu));
	case 18:
		return key_of(slot, hypercall_detail(vcpu));
	}
	return 0;
}

/*
 * Return the key of an exit of VMX whose detail is in the VMCS, or 0. A program cannot read the VMCS. If KVM read the field, it
 * keeps the value and sets a bit.
 */
static __always_inline u64 vmx_key_of_vmcs(u64 vcpu, u32 slot)
{
	u64 mask, at = known(vmx_qualification), bit = known(qualification_bit);

	switch (slot) {
	case 30:
		mask = 0xffff003f;
		break;
	case 84:
	case 85:
		mask = 0xffffffff;
		break;
	case 0:
	case 1:
		mask = 0x7ff;
		at = known(vmx_interruption);
		bit = known(interruption_bit);
		break;
	case 28:
		mask = 0x3f;
		break;
	case 29:
		mask = 0x17;
		break;
	case 44:
		mask = 0xffff;
		break;
	case 45:
		mask = 0xff;
		break;
	case 56:
		mask = 0xfff;
		break;
	default:
		return 0;
	}
	if (bit > 63 || !(read_kernel(u64, vcpu + known(vcpu_available)) >> (bit & 63) & 1))
		return 0;
	return key_of(slot, read_kernel(u64, vcpu + at) & mask);
}

/* Return the exits of a row plus those that it may have missed. */
static __always_inline u64 exits_with_missed(u64 exits, u64 missed)
{
	return exits + missed < exits ? ~0ULL : exits + missed;
}

/* Return a row. The mask proves to the verifier that it is in the tables. */
#define detail_at(tables, row)                                                                                         \
	({                                                                                                             \
		u64 at_ = (row);                                                                                       \
		asm volatile("%0 &= 0x1ff" : "+r"(at_));                                                               \
		(struct detail_row *)((char *)(tables)->details + at_ * sizeof(struct detail_row));                    \
	})
#define code_at(tables, row)                                                                                           \
	({                                                                                                             \
		u64 at_ = (row);                                                                                       \
		asm volatile("%0 &= 0x1ff" : "+r"(at_));                                                               \
		(struct code_row *)((char *)(tables)->codes + at_ * sizeof(struct code_row));                          \
	})
#define user_at(tables, row)                                                                                           \
	({                                                                                                             \
		u64 at_ = (row);                                                                                       \
		asm volatile("%0 &= 0x3f" : "+r"(at_));                                                                \
		(struct user_row *)((char *)(tables)->users + at_ * sizeof(struct user_row));                          \
	})
#define mark(bits, place)                                                                                              \
	({                                                                                                             \
		u64 word_ = (place) / 64;                                                                              \
		asm volatile("%0 &= 3" : "+r"(word_));                                                                 \
		(bits)[word_] |= 1ULL << ((place) % 64);                                                               \
	})

/* Return the row of a key. A key without a row gets one. */
static __noinline u32 detail_of(struct tables *tables, u64 key)
{
	u32 first = 1 + ((u32)key * SPREAD >> 26) * WAYS;
	u32 chosen = first;
	u64 fewest = ~0ULL;
	struct detail_row *row, *lost;

	for (u32 way = 0; way < WAYS; way++) {
		if (detail_at(tables, first + way)->key == key)
			return first + way;
	}
	for (u32 way = 0; way < WAYS; way++) {
		u64 exits;

		row = detail_at(tables, first + way);
		exits = row->key ? exits_with_missed(row->exits, row->missed_exits) : 0;
		if (exits < fewest) {
			fewest = exits;
			chosen = first + way;
		}
		if (!row->key)
			break;
	}
	row = detail_at(tables, chosen);
	if (!row->key) {
		mark(tables->details_in_use, chosen - 1);
	} else {
		lost = detail_at(tables, first);
		lost->lost += row->kernel;
		row->missed_kernel = lost->lost;
		lost = detail_at(tables, first + 1);
		lost->lost += row->user;
		row->missed_user = lost->lost;
		row->missed_exits = fewest;
		row->exits = 0;
		row->kernel = 0;
		row->user = 0;
	}
	row->key = key;
	return chosen;
}

/* Return the row of an address in the guest's code. An address without a row gets one. */
static __noinline u32 code_of(struct tables *tables, u64 rip, u32 which)
{
	u32 set = ((u32)rip + ((which & 0xff) << 3)) * SPREAD >> 26;
	u32 first = 1 + set * WAYS;
	u32 chosen = first;
	u64 fewest = ~0ULL, at = set;
	struct code_row *row;

	for (u32 way = 0; way < WAYS; way++) {
		row = code_at(tables, first + way);
		if (row->rip == rip && row->which == which && row->exits)
			return first + way;
	}
	for (u32 way = 0; way < WAYS; way++) {
		u64 exits;

		row = code_at(tables, first + way);
		exits = row->exits ? exits_with_missed(row->exits, row->missed_exits) : 0;
		if (exits < fewest) {
			fewest = exits;
			chosen = first + way;
		}
		if (!row->exits)
			break;
	}
	row = code_at(tables, chosen);
	if (!row->exits) {
		mark(tables->codes_in_use, chosen - 1);
	} else {
		asm volatile("%0 &= 63" : "+r"(at));
		tables->code_lost[at] += row->kernel;
		row->missed_kernel = tables->code_lost[at];
		row->missed_exits = fewest;
		row->exits = 0;
		row->kernel = 0;
	}
	row->rip = rip;
	row->which = which;
	return chosen;
}

/*
 * Give the latest exit its rows, unless it has them. It has ended, so KVM has read its detail by now. This is not called for a
 * preempted vCPU, whose exit may not have ended.
 */
static __always_inline void settle(struct tables *tables, struct owner *owner, u64 vcpu)
{
	u32 which = owner->pending, detail = 0, code = 0;
	u64 key = owner->key;

	if (!which)
		return;
	which &= ~OWNER_PENDING;
	if (!key && !known(is_svm))
		key = vmx_key_of_vmcs(vcpu, which & 0xff);
	if (key) {
		key |= which & WHICH_NESTED ? KEY_NESTED : 0;
		detail = detail_of(tables, key);
	} else {
		key = ((which & 0xff) + 1) | (which & WHICH_NESTED ? 1 << 8 : 0);
	}
	owner->key = key;
	if (which & WHICH_NO_RIP)
		tables->lacks_rip = which;
	else
		code = code_of(tables, owner->rip, which);
	tables->detail = detail * sizeof(struct detail_row);
	tables->code = code * sizeof(struct code_row);
	detail_at(tables, detail)->exits++;
	code_at(tables, code)->exits++;
	detail_at(tables, detail)->kernel += owner->kernel;
	code_at(tables, code)->kernel += owner->kernel;
	owner->pending = 0;
}

/* Book the kernel's ticks on the rows of the latest exit, or keep them until it has rows. */
static __always_inline void book_kernel(struct tables *tables, struct owner *owner, u64 ticks)
{
	if (owner->pending) {
		owner->kernel += ticks;
		return;
	}
	detail_at(tables, tables->detail / sizeof(struct detail_row))->kernel += ticks;
	code_at(tables, tables->code / sizeof(struct code_row))->kernel += ticks;
}

static __always_inline void book_user(struct tables *tables, u64 ticks)
{
	detail_at(tables, tables->detail / sizeof(struct detail_row))->user += ticks;
	user_at(tables, tables->user / sizeof(struct user_row))->ticks += ticks;
}

struct beginning {
	struct ledger *ledger;
	struct tables *tables;
};

/* Copy the numbers of a row of the ledger to the baseline. This is a body of bpf_loop(). */
static long copy_to_baseline(u32 number, struct beginning *beginning)
{
	struct ledger *ledger = beginning->ledger;
	struct baseline *baseline;
	u64 *cells;
	u32 slot;

	forget(number);
	if (number >= ROWS || number >= ledger->taken)
		return 1;
	slot = ledger->slots[number];
	forget(slot);
	if (slot >= SLOTS)
		return 1;
	cells = ledger->rows[number];
	baseline = &beginning->tables->baseline[slot];
	baseline->exits = cells[EXITS];
	baseline->kernel = cells[CYCLES + KERNEL];
	baseline->user = cells[CYCLES + USER];
	return 0;
}

/* Begin a vCPU's tables. This happens before its ledger counts the exit. */
static __noinline int begin_tables(struct ledger *ledger, struct tables *tables, u64 now)
{
	struct beginning beginning = { .ledger = ledger, .tables = tables };

	bpf_loop(ROWS, copy_to_baseline, &beginning, 0);
	tables->since = now;
	tables->slow.has_begun = 1;
	tables->slow.windows[0].begun = now;
	tables->slow.windows[1].begun = now;
	tables->slow.over = now + WINDOW;
	tables->has_begun = 1;
	return 0;
}

/* Count an exit to user space for a reason. @why is KVM_EXIT_*, or ABSENT for an ioctl other than KVM_RUN. */
static __noinline int count_user(struct tables *tables, u32 slot, u64 why)
{
	u64 tag = (u64)(slot + 1) << 16;
	struct user_row *row;
	u32 place = 0;

	if (!tables->has_begun)
		return 0;
	if (why == ABSENT) {
		place = tables->user / sizeof(struct user_row);
		if (user_at(tables, place)->tag >> 16 != tag >> 16)
			tables->user = 0;
		return 0;
	}
	tag |= why & 0xffff;
	for (u32 at = 1; at <= USERS; at++) {
		row = user_at(tables, at);
		if (!row->tag)
			row->tag = tag;
		if (row->tag == tag) {
			place = at;
			break;
		}
	}
	if (!place && slot < SLOTS)
		tables->other_users[slot]++;
	user_at(tables, place)->exits++;
	tables->user = place * sizeof(struct user_row);
	return 0;
}

static __always_inline u64 length_of(const struct ended_exit *exit)
{
	/* This sums all phases but HALTED. */
	return exit->ticks[0] + exit->ticks[1] + exit->ticks[3] + exit->ticks[4];
}

#define window_of(slow)                                                                                                \
	({                                                                                                             \
		u64 current_ = (slow)->current;                                                                        \
		asm volatile("%0 &= 1" : "+r"(current_));                                                              \
		(struct window *)((char *)(slow)->windows + current_ * sizeof(struct window));                         \
	})
#define kept_at(window, place)                                                                                         \
	({                                                                                                             \
		u64 place_ = (place);                                                                                  \
		asm volatile("%0 &= 15" : "+r"(place_));                                                               \
		(struct kept *)((char *)(window)->kept + place_ * sizeof(struct kept));                                \
	})

static __noinline int turn_window(struct slow *slow, u64 now)
{
	struct window *window;

	slow->current ^= 1;
	window = window_of(slow);
	window->begun = now;
	window->count = 0;
	slow->shortest = 0;
	slow->over = now + WINDOW;
	return 0;
}

/* Keep an exit among the slowest, in place of the shortest one. @entry is the number of the CPU plus 1. */
static __noinline int keep(struct slow *slow, struct owner *owner, u64 now, u64 kernel, u32 entry)
{
	struct window *window = window_of(slow);
	u64 count = window->count, shortest = ~0ULL;
	u32 place = 0, before = slow->cpu;
	struct kept *kept;

	if (count < KEPT) {
		place = count;
		window->count = count + 1;
	} else {
		for (u32 at = 0; at < KEPT; at++) {
			u64 length = length_of(&kept_at(window, at)->exit);

			if (length < shortest) {
				shortest = length;
				place = at;
			}
		}
	}
	kept = kept_at(window, place);
	kept->sequence = owner->exits - 1;
	kept->key = owner->key;
	kept->rip = owner->rip;
	kept->exit.exited = now - kernel - slow->away[0] - slow->away[1] - slow->away[2] - slow->away[3];
	kept->exit.ticks[0] = kernel;
	kept->exit.ticks[1] = slow->away[0];
	kept->exit.ticks[2] = slow->away[1];
	kept->exit.ticks[3] = slow->away[2];
	kept->exit.ticks[4] = slow->away[3];
	kept->exit.outs = slow->outs;
	kept->exit.why = slow->why;
	kept->exit.cpus = (before ? before : entry) | entry << 16;
	kept->exit.after = entry;
	if (window->count < KEPT)
		return 0;
	shortest = ~0ULL;
	for (u32 at = 0; at < KEPT; at++) {
		u64 length = length_of(&kept_at(window, at)->exit);

		shortest = length < shortest ? length : shortest;
	}
	slow->shortest = shortest;
	return 0;
}

/* Keep an exit that has ended, after @kernel ticks of the kernel, if it is slow. CLOSED means that there was no exit. */
static __noinline int end_exit(struct tables *tables, struct owner *owner, u64 now, u64 kernel)
{
	struct slow *slow = &tables->slow;
	u32 cpu = bpf_get_smp_processor_id() + 1;

	cpu = cpu > 0xffff ? 0xffff : cpu;
	if (tables->has_begun) {
		if (now >= slow->over)
			turn_window(slow, now);
		if (kernel != CLOSED && kernel + slow->away[0] + slow->away[2] + slow->away[3] > slow->shortest &&
		    owner->exits)
			keep(slow, owner, now, kernel, cpu);
	}
	slow->away[0] = 0;
	slow->away[1] = 0;
	slow->away[2] = 0;
	slow->away[3] = 0;
	slow->outs = 0;
	slow->why = 0;
	slow->cpu = cpu;
	return 0;
}

/* Add ticks of a phase in which the vCPU was off its CPU. */
static __always_inline void add_away(struct slow *slow, u32 phase, u64 ticks)
{
	u64 place = phase - USER;

	forget(place);
	if (place < PHASES - 2)
		slow->away[place] += ticks;
}

#endif

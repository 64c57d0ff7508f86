/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A vCPU's ledger and what stands beside it, as the tool reads them.
 *
 * struct ledger is `Ledger` of src/meter/ledger.rs, to the byte: the tool maps it and copies it by the module's own code.
 * Behind it are the histograms that the module allocates when a vCPU needs them (`MoreHistograms`). Both files state these
 * offsets, and neither compiles with others.
 */
#ifndef EXITMETER_BPF_LEDGER_H
#define EXITMETER_BPF_LEDGER_H

#include "kernel.h"

/* Exit reasons; reasons.rs says which code has which slot. */
#define SLOTS 178
#define SLOT_OTHER 176
#define SLOT_START 177
/* Rows of a ledger: a reason takes one when it first occurs. */
#define ROWS 60
/* Numbers of a row, and where they are. */
#define ROW 8
#define EXITS 0
#define CYCLES 1
#define MAX 6
#define HISTOGRAM 7
#define BUCKETS 64
/* Rows that have a histogram, from row 1 on, and those of them whose histograms are the ledger's own. */
#define HISTOGRAMS 36
#define OWN_HISTOGRAMS 20
/* The table that has the bucket of a time. */
#define BUCKET_STEPS 4
#define BUCKET_STEP 2048

enum phase { GUEST, KERNEL, USER, HALTED, PREEMPTED, WAITING, PHASES };

/* Of `carried`: the kernel's ticks to come are not those of an exit. */
#define CLOSED (~0ULL)

struct ledger {
	u64 begun;
	u64 last;
	u64 carried;
	/* The place of the latest exit's row: where it begins among the rows, in bytes. */
	u32 row;
	u32 phase;
	u64 first;
	/* Rows in use. */
	u32 taken;
	u32 unused_;
	/* The module's. */
	u64 tables;
	u64 more;
	/* By slot: the place of its row; 0 while it has none. */
	__u16 places[SLOTS];
	/* By row: the slot that has it. */
	u8 slots[ROWS];
	u64 rows[ROWS][ROW] __attribute__((aligned(64)));
	u64 nested[ROWS];
	u64 waiting[ROWS];
	u64 histograms[1 + OWN_HISTOGRAMS][BUCKETS];
	u64 more_histograms[HISTOGRAMS - OWN_HISTOGRAMS][BUCKETS];
} __attribute__((aligned(64)));

_Static_assert(offsetof(struct ledger, first) == 32, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, tables) == 48, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, places) == 64, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, slots) == 420, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, rows) == 512, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, nested) == 4352, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, waiting) == 4832, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, histograms) == 5312, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, more_histograms) == 16064, "as in ledger.rs");
_Static_assert(sizeof(struct ledger) == 16064 + 8192, "as in ledger.rs");

/* Whose a ledger is. */
struct owner {
	/* Odd while a vCPU has it; grows when it gets one and when that goes. */
	u64 generation;
	u64 vcpu;
	u64 kvm;
	/* The VM's number. */
	u64 vm;
	u32 pid;
	u32 id;
	char name[48];
	/* What KVM polled for the vCPU before it was taken in, and up to its latest way off a CPU, in ns. */
	u64 polled_before;
	u64 polled;
	/* SVM: the vCPU's own VMCB. With another one it runs a nested guest. */
	u64 vmcb;
	/* VMX: it may run a nested guest. */
	u64 nests;
	/* With details: exits since the tables began, and of the latest one what it was about, as far as that is known. */
	u64 exits;
	u64 key;
	u64 rip;
	/* Its `which`, and OWNER_PENDING, until it has its rows; and the kernel's ticks that these are to get. */
	u32 pending;
	u32 unused_;
	u64 kernel;
};
#define OWNER_PENDING (1u << 31)

_Static_assert(sizeof(struct owner) == 160, "as in maps.rs");

/* The vCPUs that are gone. */
struct totals {
	/* Vcpus that began to be added, and those that were. */
	u64 begun;
	u64 done;
	u64 polled;
	u64 rows[SLOTS][2 + PHASES + 1];
	u64 histograms[SLOTS][BUCKETS];
};

_Static_assert(sizeof(struct totals) == 24 + 178 * (9 + 64) * 8, "as in maps.rs");

/* What is of the whole meter. The loader writes all but the last three. */
struct meter {
	/* Another number when a reader of today would misread what is here. */
	u64 layout;
	/* 1 VMX, 2 SVM. */
	u64 isa;
	/* When it was attached, by the programs' clock. */
	u64 attached;
	/* Another number each time. */
	u64 life;
	/* Whether vCPUs have tables. */
	u64 details;
	/* Numbers given to VMs. */
	u64 vms;
	/* vCPUs that run unmetered. */
	u64 unmetered;
	/* Their exits. */
	u64 lost_exits;
};

_Static_assert(sizeof(struct meter) == 64, "as in maps.rs");

#endif

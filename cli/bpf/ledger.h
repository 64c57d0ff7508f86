/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Layout of a vCPU's ledger and of the data beside it, as the tool reads them.
 *
 * struct ledger is `Ledger` of src/meter/ledger.rs, to the byte: the tool maps it and copies it with the module's own code. The
 * histograms that the module allocates when a vCPU needs them (`MoreHistograms`) follow it. build.rs defines LEDGER_* and the
 * other sizes that are asserted here, from `C_LAYOUT` in ledger.rs.
 */
#ifndef EXITMETER_BPF_LEDGER_H
#define EXITMETER_BPF_LEDGER_H

#include "kernel.h"

/* Number of exit reasons. reasons.rs maps exit codes to their slots. */
#define SLOTS 178
#define SLOT_OTHER 176
#define SLOT_START 177
/* Number of a ledger's rows. A reason takes one when it first occurs. */
#define ROWS 60
/* Number of a row's cells, and their places. */
#define ROW 8
#define EXITS 0
#define CYCLES 1
#define MAX 6
#define HISTOGRAM 7
#define BUCKETS 64
/* Rows that have a histogram, from row 1 on, and those of them that have it in the module's ledger. */
#define HISTOGRAMS 36
#define OWN_HISTOGRAMS 20
/* Size of the table of buckets. */
#define BUCKET_STEPS 4
#define BUCKET_STEP 2048

enum phase { GUEST, KERNEL, USER, HALTED, PREEMPTED, WAITING, PHASES };

/* Value of `carried`: the kernel's next ticks do not belong to an exit. */
#define CLOSED (~0ULL)

struct ledger {
	u64 begun;
	u64 last;
	u64 carried;
	/* Place of the latest exit's row: its offset in the rows, in bytes. */
	u32 row;
	u32 phase;
	u64 first;
	/* Number of rows in use. */
	u32 taken;
	u32 unused_;
	/* For the module alone. */
	u64 tables;
	u64 more;
	/* By slot: place of its row, or 0 while it has none. */
	__u16 places[SLOTS];
	/* By row: slot that owns it. */
	u8 slots[ROWS];
	u64 rows[ROWS][ROW] __attribute__((aligned(64)));
	u64 nested[ROWS];
	u64 waiting[ROWS];
	u64 histograms[1 + OWN_HISTOGRAMS][BUCKETS] __attribute__((aligned(64)));
	u64 more_histograms[HISTOGRAMS - OWN_HISTOGRAMS][BUCKETS];
} __attribute__((aligned(64)));

_Static_assert(offsetof(struct ledger, first) == LEDGER_FIRST, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, tables) == LEDGER_TABLES, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, places) == LEDGER_PLACES, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, slots) == LEDGER_SLOTS, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, rows) == LEDGER_ROWS, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, nested) == LEDGER_NESTED, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, waiting) == LEDGER_WAITING, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, histograms) == LEDGER_HISTOGRAMS, "as in ledger.rs");
_Static_assert(offsetof(struct ledger, more_histograms) == LEDGER_SIZE, "as in ledger.rs");
_Static_assert(sizeof(struct ledger) == LEDGER_SIZE + MORE_HISTOGRAMS_SIZE, "as in ledger.rs");
_Static_assert(ROW * sizeof(u64) == ROW_SIZE, "as in ledger.rs");

/* Owner of a ledger. */
struct owner {
	/* Generation, odd while a vCPU has the ledger. It grows by one when a vCPU takes or leaves the ledger. */
	u64 generation;
	u64 vcpu;
	u64 kvm;
	/* Number of the VM. */
	u64 vm;
	u32 pid;
	u32 id;
	char name[48];
	/* KVM's polling for the vCPU before it got the ledger, in ns. */
	u64 polled_before;
	/* KVM's polling since then, as of when the vCPU last left a CPU, in ns. */
	u64 polled;
	/* SVM: the vCPU's own VMCB. With another one it runs a nested guest. */
	u64 vmcb;
	/* VMX: true if the vCPU may run a nested guest. */
	u64 nests;
	/* With details: exits since the tables began. */
	u64 exits;
	/* Details of the latest exit, as far as they are known. */
	u64 key;
	u64 rip;
	/* The latest exit's `which` and OWNER_PENDING, until the exit has its rows. */
	u32 pending;
	u32 unused_;
	/* Kernel ticks to book on these rows. */
	u64 kernel;
};
#define OWNER_PENDING (1u << 31)

_Static_assert(sizeof(struct owner) == 160, "as in maps.rs");

/* Sums of one reason: `RowCopy` of ledger.rs. */
struct sums {
	u64 exits;
	u64 nested_exits;
	u64 cycles[PHASES];
	u64 max;
};

_Static_assert(sizeof(struct sums) == SUMS_SIZE, "as in ledger.rs");

/* Totals of the vCPUs that are gone. */
struct totals {
	/* Number of vCPUs whose addition has begun, and number of those whose addition is done. */
	u64 begun;
	u64 done;
	u64 polled;
	struct sums rows[SLOTS];
	u64 histograms[SLOTS][BUCKETS];
};

_Static_assert(sizeof(struct totals) == 24 + SLOTS * (SUMS_SIZE + BUCKETS * 8), "as in maps.rs");

/* State of the whole meter. The loader writes all but the last three fields. */
struct meter {
	/* Version of this layout. It changes if an existing reader would misread the data. */
	u64 layout;
	/* 1 VMX, 2 SVM. */
	u64 isa;
	/* Time of attachment, by the programs' clock. */
	u64 attached;
	/* Number of the meter's life, different each time. */
	u64 life;
	/* True if vCPUs have tables. */
	u64 details;
	/* Highest number given to a VM. */
	u64 vms;
	/* Number of vCPUs that run unmetered. */
	u64 unmetered;
	/* Exits of unmetered vCPUs. */
	u64 lost_exits;
};

_Static_assert(sizeof(struct meter) == 64, "as in maps.rs");

#endif

// SPDX-License-Identifier: GPL-2.0

// What a board of ours may have, in the types of Grafana's own schema. scripts/boards-check.sh puts a version in the place of
// VERSION, and holds the boards against it.

import type * as cog from "VERSION/cog";
import type * as common from "VERSION/common";
import type * as dashboard from "VERSION/dashboard";
import type * as prometheus from "VERSION/prometheus";
import type * as stat from "VERSION/stat";
import type * as table from "VERSION/table";
import type * as timeseries from "VERSION/timeseries";

/** A type as JSON has it: the words of an enum in place of its members, and no functions. */
type Json<T> = 0 extends 1 & T ? any
  : T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends (infer Item)[] ? Json<Item>[]
  : { [Key in keyof T as T[Key] extends (...given: any) => any ? never : Key]: Json<T[Key]> };

/** The queries' type had another name in older versions. */
type Query = typeof prometheus extends { defaultDataquery: () => infer Type } ? Type
  : typeof prometheus extends { defaultdataquery: () => infer Type } ? Type
  : never;

/** A panel whose options are known. Grafana puts in those that are not there. */
type Panel<Type extends string, Options, Custom> =
  & Omit<Json<dashboard.Panel>, "type" | "options" | "fieldConfig" | "targets">
  & {
    type: Type;
    options: Partial<Json<Options>>;
    fieldConfig: {
      defaults: Omit<Json<dashboard.FieldConfig>, "custom"> & { custom?: Json<Custom> };
      overrides: Json<dashboard.FieldConfigSource["overrides"]>;
    };
    targets: Json<Query>[];
  };

export type Board = Omit<Json<dashboard.Dashboard>, "panels"> & {
  panels: (
    | Panel<"timeseries", timeseries.Options, common.GraphFieldConfig>
    | Panel<"stat", stat.Options, Record<string, never>>
    | Panel<"table", table.Options, Partial<common.TableFieldOptions>>
  )[];
};
